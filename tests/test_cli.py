"""The command says at once what it can know at once: nothing that takes seconds to import is touched for that."""
import subprocess, sys

import pytest

program = '''
import sys
from astroformer_astro.cli import main
status = main(sys.argv[1:])
print(status, *sorted({'torch', 'fastai', 'captum', 'pandas', 'matplotlib'} & set(sys.modules)))
'''


@pytest.mark.parametrize('words, missing', [('predict gone table.csv out.csv', 'gone.safetensors'), ('predict here gone.csv out.csv', 'gone.csv'), ('explain gone.json a.png', 'gone.json'),
                                            ('explain here gone.png', 'gone.png'), ('explain here a.png,gone.fits', 'gone.fits')])
def test_a_missing_file_is_refused_before_the_heavy_imports(words, missing, tmp_path):
    for name in ('here.safetensors', 'here.json', 'a.png'): (tmp_path/name).touch()
    done = subprocess.run([sys.executable, '-c', program, *words.split()], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == '2\n'
    assert f'{missing} does not exist; give the path of' in done.stderr and done.stderr.count('\n') == 1
