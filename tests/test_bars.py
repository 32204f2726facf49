"""What the README claims, measured again; minutes each, so `make slow`."""
import pytest
from pathlib import Path

from astroformer_astro.bench import bench_transfer
from astroformer_astro.job import Job, run_job

pytestmark = pytest.mark.slow
shared = Path(__file__).parents[2]/'shared'/'data'
real = pytest.mark.skipif(not shared.exists(), reason='the real galaxies are not here')


def test_demo(tmp_path):
    m = run_job(Job(out=tmp_path))
    assert m['fresh']['accuracy'] >= .80 and m['peak_memory_GiB'] < 4
    assert m['second']['after']['balanced_accuracy'] > m['second']['before']['balanced_accuracy']


@real
def test_real_galaxies_from_scratch_and_to_another_survey(tmp_path):
    m = run_job(Job(out=tmp_path, catalog=str(shared/'ngc_sdss'/'labels.csv'), y='coarse4', arch='astroformer_pico'))
    assert m['held_out']['balanced_accuracy'] >= .66
    runs = bench_transfer(shared/'gz2'/'labels.csv', tmp_path/'galaxies', seeds=3)
    mean = runs.groupby('start').balanced_accuracy.mean()
    assert mean['fine-tuned'] > mean['scratch']
