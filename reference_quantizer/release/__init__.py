"""What a release shows: storage tables, figures, the model card; and how it gets to the Hub."""
