"""Notebooks clean, library in step with them, README current. With --fix, make it so; without, say what is not."""
import os, re, subprocess, sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).parent.parent


def readme():
    "index.ipynb as Markdown: no code cells, only what they printed; links made relative to the top folder"
    nb = nbformat.read(root/'nbs'/'index.ipynb', 4)
    nb.cells = [c for c in nb.cells if not c.source.startswith('#| hide')]
    text = MarkdownExporter(exclude_input=True).from_notebook_node(nb)[0]
    text = re.sub(r'\]\((?!http)([^)]+)\)', lambda m: f"]({os.path.normpath('nbs/' + m[1])})", text)
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'


def snapshot(folder, pattern):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob(pattern)) if '.ipynb_checkpoints' not in p.parts}


def tool(name, *args):
    subprocess.run([Path(sys.executable).parent/name, *args], cwd=root, check=True, stdout=subprocess.DEVNULL)


def main(fix):
    before = snapshot(root/'nbs', '*.ipynb'), snapshot(root/'astroformer_astro', '*.py')
    tool('nbdev-clean')
    tool('nbdev-export')
    after = snapshot(root/'nbs', '*.ipynb'), snapshot(root/'astroformer_astro', '*.py')
    changed = [str(name) for old, new in zip(before, after) for name in new.keys() | old.keys() if old.get(name) != new.get(name)]
    stale = (root/'README.md').read_text() != readme()
    if fix: (root/'README.md').write_text(readme())
    if fix or not (changed or stale): return 0
    if changed: print('not clean, or not exported; cleaned and exported now, look at git diff:', *changed, sep='\n  ')
    if stale: print('README.md is not what nbs/index.ipynb renders to; run make docs')
    return 1


if __name__ == '__main__': sys.exit(main('--fix' in sys.argv[1:]))
