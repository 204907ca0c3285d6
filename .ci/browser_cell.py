"Run the cell of an exercise in Brython, in a worker of the browser. What it prints is sent to the page."

import sys

import numpy as np
from browser import self as worker
from written_step import judge_step

CELL = "<string>"  # what exec calls a text; Brython cannot run all that its compile gives


class Page:
    "What the cell prints to."

    def write(self, text):
        worker.send(text)

    def flush(self):
        "Nothing is held back."


def place(error):
    "Where in the cell an error arose: a line of it, or nothing."
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == CELL:
            line = trace.tb_lineno
        trace = trace.tb_next
    return f" (line {line})" if line else ""


def run(source, expected):
    "Run a cell that uses np, judge_step and expected, as its notebook has them."
    sys.stdout = sys.stderr = Page()
    names = {"__name__": "__main__", "np": np, "judge_step": judge_step, "expected": expected}
    try:
        exec(source, names)
    except Exception as error:
        print(f"{type(error).__name__}: {error}{place(error)}")
