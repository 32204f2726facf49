"""What a user can get wrong ends in one sentence and status 2, before any training."""
import h5py, numpy as np, pandas as pd, pytest
from pathlib import Path
from PIL import Image

from astroformer_astro.cli import main
from astroformer_astro.data.block import GalaxyDataLoaders
from astroformer_astro.data.images import read_images
from astroformer_astro.synth import synth_galaxy10

shared = Path(__file__).parents[2]/'shared'/'data'


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    return synth_galaxy10(tmp_path_factory.mktemp('good')/'good.h5', n=40, size=64, seed=0, balance='uniform')


@pytest.fixture
def altered(good, tmp_path):
    "A copy of the good file with some datasets replaced, or left out where None"
    def make(**changes):
        with h5py.File(good) as src, h5py.File(tmp_path/'bad.h5', 'w') as dst:
            for k in src:
                v = changes.get(k, src[k][:])
                if v is not None: dst[k] = v
        return tmp_path/'bad.h5'
    return make


@pytest.fixture
def refused(tmp_path, capsys):
    "Run `astroformer train`; it must stop with one sentence that contains all of `words`"
    def check(*options, words, out=None):
        assert main(['train', '--epochs', '1', '--out', str(out or tmp_path/'out'), *map(str, options)]) == 2
        said = capsys.readouterr().err.strip()
        assert said.count('\n') == 0 and 'Traceback' not in said and said.endswith('.')
        for word in words: assert word in said, said
    return check


def test_missing_file(refused): refused('--data', 'nowhere.h5', words=['nowhere.h5 does not exist'])
def test_missing_catalogue(refused): refused('--catalog', 'nowhere.csv', words=['nowhere.csv does not exist'])
def test_unknown_network(refused, good): refused('--data', good, '--arch', 'resnet', words=["'resnet'", 'astroformer_pico'])
def test_tiny_size(refused, good): refused('--data', good, '--size', 8, words=['32 px'])


def test_not_hdf5(refused, tmp_path):
    (tmp_path/'a.h5').write_text('hello')
    refused('--data', tmp_path/'a.h5', words=['a.h5', 'HDF5'])


def test_truncated_hdf5(refused, good, tmp_path):
    (tmp_path/'cut.h5').write_bytes(good.read_bytes()[:-40_000])
    refused('--data', tmp_path/'cut.h5', words=['cut.h5'])


@pytest.mark.parametrize('changes, words', [
    (dict(images=None), ["no dataset 'images'"]),
    (dict(ans=None), ["no dataset 'ans'"]),
    (dict(images=np.zeros((40, 64, 64), np.uint8)), ['(40, 64, 64)', '(N, H, W, 3)']),
    (dict(images=np.zeros((40, 64, 64, 3))), ['float64']),
    (dict(ans=np.full(40, 12, np.uint8)), ['[12]', '10 classes']),
    (dict(ans=np.zeros(40, np.uint8)), ['at least two']),
    (dict(ans=np.zeros(39, np.uint8)), ['one label an image']),
])
def test_layout(altered, refused, changes, words): refused('--data', altered(**changes), words=words)


def test_two_images(altered, refused):
    two = dict(images=np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), np.uint8), ans=np.array([0, 1]))
    refused('--data', altered(**two, ra=None, dec=None, redshift=None, pxscale=None), words=['at least 2 galaxies'])


def test_nan_redshifts_are_counted(altered, capsys):
    z = np.linspace(.01, .1, 40)
    z[:7] = np.nan
    GalaxyDataLoaders.from_hdf5(altered(redshift=z), progress=False).summary()
    assert '7 without a redshift' in capsys.readouterr().out


@pytest.fixture
def catalogue(tmp_path):
    "A table of 20 images, one of which is made by `spoil`"
    def make(spoil):
        rng = np.random.default_rng(0)
        for k in range(20): Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path/f'{k}.jpg')
        spoil(tmp_path/'7.jpg')
        pd.DataFrame(dict(file=[f'{k}.jpg' for k in range(20)], label=['a', 'b']*10)).to_csv(tmp_path/'t.csv', index=False)
        return tmp_path/'t.csv'
    return make


spoiled = [(lambda p: p.unlink(), 'does not exist'),
           (lambda p: Image.new('RGB', (64, 64)).save(p), 'is blank'),
           (lambda p: p.write_text('<html>busy</html>'), 'it is a web page'),
           (lambda p: p.write_bytes(b''), 'the file is empty'),
           (lambda p: p.write_bytes(p.read_bytes()[:900]), 'cannot be read')]


@pytest.mark.parametrize('spoil, words', spoiled)
def test_bad_row(catalogue, refused, spoil, words):
    refused('--catalog', catalogue(spoil), words=['1 of 20 rows', 'row 7', '7.jpg', words])


def test_bad_rows_can_be_left_out(catalogue, capsys):
    dls = GalaxyDataLoaders.from_catalog(catalogue(lambda p: p.unlink()), bad='skip', size=32, progress=False)
    dls.summary()
    assert '1 row left out' in capsys.readouterr().out and len(dls.catalog) == 19


def test_missing_column(catalogue, refused):
    refused('--catalog', catalogue(lambda p: None), '--y', 'kind', words=["no column 'kind'", "'label'"])


@pytest.mark.skipif(not shared.exists(), reason='the real bad images are not here')
def test_real_bad_images(refused, tmp_path):
    files = sorted(map(str, (shared/'bad_inputs').glob('*.jpg')))
    pd.DataFrame(dict(file=files, label=['a', 'b', 'a'])).to_csv(tmp_path/'t.csv', index=False)
    refused('--catalog', tmp_path/'t.csv', '--images', '/', words=['3 of 3 rows', 'is blank', 'is a message drawn as a picture'])


@pytest.mark.skipif(not shared.exists(), reason='the real galaxies are not here')
def test_no_real_galaxy_is_refused():
    files = [*(shared/'ngc_sdss'/'images').glob('*.jpg'), *(shared/'gz2').glob('*/*.jpg')]
    assert len(files) > 4000 and not read_images(files, 32, progress=False)[1]


@pytest.mark.parametrize('out', ['/proc/nowhere/out', __file__])
def test_unwritable_output(refused, good, out): refused('--data', good, out=out, words=['cannot be written'])


def test_nothing_is_left_behind(refused, tmp_path):
    (tmp_path/'a.h5').write_text('hello')
    refused('--data', tmp_path/'a.h5', words=['HDF5'])
    assert not list((tmp_path/'out').iterdir())


def test_an_interrupted_training_says_how_to_go_on(monkeypatch, tmp_path, capsys):
    def stopped(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr('astroformer_astro.job.run_job', stopped)
    assert main(['train', '--out', str(tmp_path)]) == 130
    assert 'stopped. The same words with --resume' in capsys.readouterr().err
