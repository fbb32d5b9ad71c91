"""`acttail lm-eval`: lm-eval's command line, with the model `acttail` registered."""

import typer


def lm_eval(context: typer.Context) -> None:
    """Run lm-eval with --model acttail --model_args pretrained=MODEL,plan=FILE and its own options.

    All arguments go to lm-eval as they are: `acttail lm-eval run --help` prints them.
    """
    from acttail.evaluate.harness import main

    main(context.args)
