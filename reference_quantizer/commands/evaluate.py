"""`evaluate`: measures a repository against its base."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from reference_quantizer.commands.options import STYLE, add_evaluation_arguments, add_job_arguments, integer
from reference_quantizer.commands.settings import evaluation_datasets, evaluation_options, evaluation_settings
from reference_quantizer.progress import program, tell
from reference_quantizer.release import report
from reference_quantizer.release.card import CARD, is_stale
from tqformat.load_quantized import TQFormatError

EVALUATE = """Measure a repository against the checkpoint it was made from.

Perplexity in sliding windows, KL divergence and top-1 agreement of the next-token distributions, the change of the right
token's probability, the cosine of the logits after fixed prompts, and greedy samples, of which those that repeat themselves
are told. Writes eval_summary.json and sample_generations.json into the repository. Both
models are in memory at once. An interrupted run continues when the same command is given again. The text must give two
windows; with fewer than about twenty the figures are rough.
"""
EXAMPLES = """examples:
  python -m reference_quantizer evaluate ./model ./model-4bit --dataset test.txt
  python -m reference_quantizer evaluate ./model ./model-4bit --dataset test.txt --max-windows 40
  python -m reference_quantizer evaluate owner/name ./model-4bit --device cuda
  python -m reference_quantizer evaluate model.gguf ./model-4bit --dataset test.txt --max-length 2048
  python -m reference_quantizer evaluate ./model ./model-4bit --dataset test.txt --dataset held_out.txt --floor
  python -m reference_quantizer evaluate ./model ./model-4bit --dataset test.txt --tasks arc_easy,piqa

Figures of two releases compare where text, windows, --bos and base are the same. `card` puts them into README.md.
"""


def run_evaluate(args: argparse.Namespace) -> int:
    """Evaluate a repository, write the figures into it and print them."""
    for option, given in (("--tasks-dir", args.tasks_dir), ("--tasks-limit", args.tasks_limit)):
        if given is not None and not args.tasks:
            raise TQFormatError("SCHEMA.VALUE", option, "no task is asked for; add --tasks NAME,...")
    from reference_quantizer.evaluation import evaluate, tasks  # torch takes seconds to import

    options = evaluation_options(args) | {"base_revision": args.revision}
    datasets, chosen = evaluation_datasets(args), evaluation_settings(args)
    found = tasks.find_tasks(args.tasks, args.tasks_dir) if args.tasks else {}  # what is missing is told at once
    summary = evaluate.evaluate(args.source, args.repo, datasets, chosen, **options)
    print(evaluate.describe(summary, evaluate.read_samples(args.repo)))
    if found:
        where = {"base_revision": args.revision, "cache_dir": args.cache_dir, "quiet": args.quiet}
        results = tasks.evaluate_tasks(args.source, args.repo, found, chosen, limit=args.tasks_limit, **where)
        print(tasks.describe(results))
    print(f"size          {report.size_line(args.repo)}")
    if is_stale(args.repo):
        tell(f"note: {CARD} is out of date now; write it again: {program()} card {shlex.quote(str(args.repo))}")
    return 0


def add_command(commands: Any) -> None:
    """Add `evaluate` to the command line."""
    help_ = "measure a repository against its base"
    evaluate = commands.add_parser("evaluate", help=help_, description=EVALUATE, epilog=EXAMPLES, formatter_class=STYLE)
    help_ = "checkpoint directory, Hub id or GGUF file that REPO was made from; a GGUF file is imported into the cache"
    evaluate.add_argument("source", metavar="BASE", help=help_)
    evaluate.add_argument("repo", metavar="REPO", type=Path, help="repository directory; both files go into it")
    evaluate.add_argument("--revision", help="branch, tag or commit, where BASE is a Hub id")
    add_evaluation_arguments(evaluate)
    tasks = evaluate.add_argument_group("tasks (put to both models by lm-eval, the extra `tasks`; task_results.json)")
    help_ = "names, as `lm-eval ls tasks` lists them; data that are not here are fetched from the Hub"
    tasks.add_argument("--tasks", metavar="NAME,...", type=lambda text: text.split(","), help=help_)
    tasks.add_argument("--tasks-dir", metavar="DIR", type=Path, help="where further tasks are described (YAML)")
    help_ = "documents of each task (default: all)"
    tasks.add_argument("--tasks-limit", metavar="N", type=integer(1, 10**9), help=help_)
    add_job_arguments(evaluate)
    evaluate.set_defaults(run=run_evaluate)
