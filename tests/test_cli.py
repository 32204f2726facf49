"""The command says at once what it can know at once: nothing that takes seconds to import is touched for that."""
import subprocess, sys

import pytest

from astroformer_astro.cli import _function, _verbs, explain, main
from astroformer_astro.core import GalaxyDataError

program = '''
import sys
from astroformer_astro.cli import main
status = main(sys.argv[1:])
print(status, *sorted({'torch', 'fastai', 'captum', 'pandas', 'matplotlib'} & set(sys.modules)))
'''


def run(words, folder):
    return subprocess.run([sys.executable, '-c', program, *words.split()], cwd=folder, capture_output=True, text=True, check=True)


gone = [('predict gone table.csv out.csv', 'gone.safetensors'), ('predict here gone.csv out.csv', 'gone.csv'), ('explain gone.json a.png', 'gone.json'),
        ('explain here gone.png', 'gone.png'), ('explain here a.png,gone.fits', 'gone.fits'),
        ('train --epochs 1 --data gone.h5', 'gone.h5'), ('train --catalog=gone.csv', 'gone.csv'), ('train --data a.png --pretrained gone', 'gone.safetensors'),
        ('bench accuracy gone.csv --y kind', 'gone.csv'), ('bench transfer gone.csv here', 'gone.csv'), ('bench explain gone a.png', 'gone.safetensors'),
        ('bench explain here gone.csv', 'gone.csv'), ('bench explain here a.png --relabelled gone', 'gone.safetensors')]


@pytest.mark.parametrize('words, missing', gone)
def test_a_missing_file_is_refused_before_the_heavy_imports(words, missing, tmp_path):
    for name in ('here.safetensors', 'here.json', 'a.png'): (tmp_path/name).touch()
    done = run(words, tmp_path)
    assert done.stdout == '2\n'
    assert f'{missing} does not exist; give the path of' in done.stderr and done.stderr.count('\n') == 1


@pytest.mark.parametrize('words', ['explain here galaxies', 'train --data galaxies', 'train --pretrained galaxies.json'])
def test_a_folder_is_refused_before_the_heavy_imports(words, tmp_path):
    for name in ('galaxies', 'galaxies.json'): (tmp_path/name).mkdir()
    (tmp_path/'here.safetensors').touch()
    done = run(words, tmp_path)
    assert done.stdout == '2\n'
    assert f'{words.split()[-1]} is a folder; give the path of' in done.stderr and done.stderr.count('\n') == 1


@pytest.mark.parametrize('words, status', [('', 2), ('--help', 0), ('bench', 2), ('tarin --data a.h5', 2)])
def test_the_verbs_are_listed_without_the_heavy_imports(words, status, tmp_path):
    done = run(words, tmp_path)
    assert done.stdout.splitlines()[-1] == str(status)
    assert all(f'  {v:15} ' in done.stdout + done.stderr for v in _verbs)


@pytest.mark.parametrize('verb', [v for v, f in _verbs.items() if not callable(f)])
def test_the_list_says_what_the_verbs_themselves_say(verb):
    assert _verbs[verb][1] == _function(verb).__doc__.splitlines()[0]


def test_a_name_with_a_comma_is_one_file(tmp_path):
    for name in ('w.safetensors', 'NGC 1,2.jpg'): (tmp_path/name).touch()
    for image, refusal in ('NGC 1,2.jpg', 'why.doc ends in'), ('NGC 1,3.jpg', 'NGC 1 does not exist'):       # the kind of the output is looked at next
        with pytest.raises(GalaxyDataError, match=refusal): explain(str(tmp_path/'w'), str(tmp_path/image), 'why.doc')


@pytest.mark.parametrize('words, verb', [(['trian', '--epochs', '3'], 'trian'), (['bench', 'acuracy'], 'bench acuracy'), (['bench'], 'bench')])
def test_a_verb_that_there_is_not_is_named(words, verb, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith('usage: astroformer VERB') and said.endswith(f'astroformer: there is no verb {verb!r}.\n')
