"""The job itself: a plan becomes a stream of encoded weights, which the writer takes; tuning follows."""
