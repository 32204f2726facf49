"""No module imports from its own floor or one above: the arrows of the design point down."""
import ast, json, re
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
package = 'astroformer_astro'


def floors():
    "Module path to floor number, read off the notebooks' names and their default_exp"
    found = {}
    for nb in (root/'nbs').glob('[0-9]*.ipynb'):
        exp = re.search(r'#\| default_exp ([\w.]+)', nb.read_text())
        if exp: found[f'{package}.{exp[1]}'] = int(nb.name.split('_')[0])
    return found


def imports(module, source):
    "Modules that `source`, the text of `module`, imports, anywhere in it"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split('.')[:-node.level] if node.level else []
            yield '.'.join([*base, node.module or ''])


def violations(module, source, table):
    return [m for m in imports(module, source) if m.startswith(package) and table.get(m, 10**6) >= table[module]]


def modules(folder):
    return [(f'{package}.{folder}.{p.stem}', p.read_text()) for p in (root/package/folder).glob('*.py')]


@pytest.mark.parametrize('module', sorted(floors()))
def test_imports_point_down(module):
    source = (root/(module.replace('.', '/') + '.py')).read_text()
    assert violations(module, source, floors()) == []


@pytest.mark.parametrize('folder, banned', [('models', 'fastai'), ('models', f'{package}.data'), ('interpret', f'{package}.data'),
                                            ('interpret', f'{package}.learner')])
def test_what_a_folder_must_not_know(folder, banned):
    assert modules(folder)
    for module, source in modules(folder): assert not [m for m in imports(module, source) if m.startswith(banned)], module


def test_an_upward_arrow_is_seen():
    table = {f'{package}.core': 0, f'{package}.data.sky': 13, f'{package}.learner': 32}
    assert violations(f'{package}.core', f'def f():\n    from {package}.learner import x', table) == [f'{package}.learner']
    assert violations(f'{package}.data.sky', 'from ..learner import x', table) == [f'{package}.learner']
    assert violations(f'{package}.data.sky', 'from ..core import x', table) == []


def test_the_network_is_read_in_one_sitting():
    cells = [''.join(c['source']) for nb in (root/'nbs').glob('2[012]_*.ipynb') for c in json.loads(nb.read_text())['cells'] if c['cell_type'] == 'code']
    lines = [l for c in cells if c.startswith('#| export') for l in c.splitlines() if l.strip() and not l.lstrip().startswith('#')]
    assert 200 < len(lines) < 400
