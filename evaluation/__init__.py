"""How good is a model? Tasks are run on it, and scores are printed, kept and compared.

    runner.py      a task on a model -> a TaskResult; training calls it, too
    prompts.py     what the model reads
    statistics.py  standard errors, and which differences are real
    selection.py   --tasks -> tasks
    results.py     results on disk, one file each, and going on with an unfinished one
    tables.py      what is printed
    report.py      a page about a model (page.py and report.html write it down)

    public.py      public benchmarks, in the same tables and folder: through lm-evaluation-harness
                   (harness.py), and CORE (core.py)
    sandbox.py     runs code that a model has written

evaluate.py is the command line.
"""
