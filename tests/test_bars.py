"""What the README claims, measured again; minutes each, so `make slow`."""
import shutil
from pathlib import Path

import numpy as np, pandas as pd, pytest
from astropy.io import fits

from astroformer_astro.bench import bench_data, bench_transfer
from astroformer_astro.core import seed_everything
from astroformer_astro.data.block import GalaxyDataLoaders
from astroformer_astro.data.sky import split_galaxies
from astroformer_astro.job import Job, run_job
from astroformer_astro.learner import astroformer_learner, evaluate
from astroformer_astro.synth import synth_fits

pytestmark = pytest.mark.slow
shared = Path(__file__).parents[2]/'shared'/'data'
real = pytest.mark.skipif(not shared.exists(), reason='the real galaxies are not here')


def test_demo(tmp_path):
    m = run_job(Job(out=tmp_path))
    assert m['fresh']['accuracy'] >= .80 and m['peak_memory_GiB'] < 4
    assert m['second']['after']['balanced_accuracy'] > m['second']['before']['balanced_accuracy']


@real
def test_flux_in_five_bands_learns_with_real_cubes_in_the_batch(tmp_path):
    table = pd.read_csv(synth_fits(tmp_path, n=2000, size=64, seed=0)).drop(columns=['ra', 'dec'])
    shutil.copy(shared/'fits'/'hsc_grizy_cube'/'Cut_HSC.fits', tmp_path/'hsc.fits')
    with fits.open(tmp_path/'hsc.fits', mode='update') as f: f[0].header.update(BANDS='grizy', MAGZERO=27., BUNIT='adu')
    table = pd.concat([table, pd.DataFrame(dict(file='hsc.fits', label=['Merging Galaxies']*4))], ignore_index=True)
    seed_everything(0)
    valid = split_galaxies(table.label[:2000], seed=1)[1]
    dls = GalaxyDataLoaders.from_fits(table, images=tmp_path, valid=valid, progress=False)
    assert list(dls.galaxies.bands) == list('grizy') and np.isfinite(dls.galaxies.images).all() and 2003 in dls.train_ds.items
    learn = astroformer_learner(dls, 'astroformer_nano')
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(30)
    assert evaluate(learn)['metrics']['accuracy'] >= .75


@real
def test_real_galaxies_from_scratch_and_to_another_survey(tmp_path):
    m = run_job(Job(out=tmp_path, catalog=str(shared/'ngc_sdss'/'labels.csv'), y='coarse4', arch='astroformer_pico'))
    assert m['held_out']['balanced_accuracy'] >= .66
    runs = bench_transfer(shared/'gz2'/'labels.csv', tmp_path/'galaxies', seeds=3)
    mean = runs.groupby('start').balanced_accuracy.mean()
    assert mean['fine-tuned'] > mean['scratch']


def test_reading():
    found = bench_data(gigabytes=2)
    assert found['repacked_over_shipped'] >= 100 and found['repacked_over_memmap'] >= .5 and found['repack_peak_mib'] < 500
    assert found['default_share'] <= .10 and found['everything_share'] <= .25
