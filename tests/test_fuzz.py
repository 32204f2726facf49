"""Five hundred damaged files: a clean error or a right read, each time."""
import subprocess, sys
from pathlib import Path

import pytest


@pytest.mark.parametrize('kind, cases', [('hdf5', 170), ('fits', 170), ('jpeg', 160)])
def test_damage_ends_in_a_clean_error_or_a_right_read(kind, cases):
    done = subprocess.run([sys.executable, Path(__file__).with_name('fuzz.py'), kind, '0', str(cases)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]          # a crash of the interpreter, or the alarm of a hang
    assert done.stdout == ''
