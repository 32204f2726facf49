"""The ten lines of the README run as they stand, only smaller."""
import os, re
from pathlib import Path

import pandas as pd
from PIL import Image

from astroformer_astro.synth import synth_arrays

readme = (Path(__file__).parent.parent/'README.md').read_text()


def test_quick_start(tmp_path, monkeypatch):
    code = re.search(r'```python\n(.*?)```', readme, re.S)[1]
    for long, short in (('n=2000', 'n=100'), ('fit_one_cycle(10', 'fit_one_cycle(1'), ('fit_recipe(5', 'fit_recipe(1'), ('astroformer_pico', 'astroformer_nano'),
                        ('calibrate(learn)', 'pass')):        # which refuses a network that one epoch on 80 galaxies left worse than chance; tests/test_calibration.py has it
        assert long in code
        code = code.replace(long, short)
    monkeypatch.chdir(tmp_path)
    os.mkdir('cutouts')
    sim = synth_arrays(n=40, size=64, seed=1, balance='uniform')
    for k, img in enumerate(sim['images']): Image.fromarray(img).save(f'cutouts/{k}.jpg')
    pd.DataFrame(dict(file=[f'{k}.jpg' for k in range(40)], label=['disc' if a > 4 else 'smooth' for a in sim['ans']])).to_csv('survey.csv', index=False)
    pd.DataFrame(dict(file=[f'cutouts/{k}.jpg' for k in range(5)])).to_csv('all_of_it.csv', index=False)
    exec(code, {})
    out = pd.read_parquet('morphology.parquet')
    assert len(out) == 5 and set(out.predicted) <= {'disc', 'smooth'} and out.problem.isna().all()


def test_every_file_it_names_is_there():
    for target in re.findall(r'\]\((?!http)([^)#]+)\)', readme): assert (Path(__file__).parent.parent/target).exists(), target
