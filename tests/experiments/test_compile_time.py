"""What is compiled: scanned, the same program at every depth."""

from experiments.compile_time import lowered_step, table
from gqa.training.config import parse


def test_only_the_unrolled_program_grows_with_depth(tiny_config):
    config = parse(tiny_config("t5", {}))
    lines = {
        (scan, layers): len(lowered_step(config, layers, scan_layers=scan).as_text().splitlines())
        for scan in (True, False)
        for layers in (2, 4)
    }
    assert lines[True, 2] == lines[True, 4]
    assert lines[False, 4] > 1.3 * lines[False, 2]


def test_the_table():
    rows = [{"form": "scanned", "layers": 4, "program_lines": 3630, "trace_s": 0.61, "compile_s": 2.14}]
    assert table(rows)[-1] == "| 4 | scanned | 3630 | 0.6 | 2.1 |"
