"""Workers, pickles and turns: what the data notebooks do not show on a page."""
import pickle

from pathlib import Path

import h5py, numpy as np, pandas as pd, pytest, torch
from PIL import Image
from astropy.table import Table
from fastai.learner import load_learner
from hypothesis import given, settings, strategies as st

from astroformer_astro.core import GalaxyDataError, seed_everything
from astroformer_astro.data.augment import GalaxyAugment, dihedral
from astroformer_astro.data.block import CutoutReader, GalaxyDataLoaders
from astroformer_astro.data.tensor import TensorGalaxy
from astroformer_astro.data import block, fits as data_fits, images
from astroformer_astro.data.hdf5 import pack, read_hdf5
from astroformer_astro.learner import astroformer_learner
from astroformer_astro.synth import synth_fits, synth_galaxy10


@pytest.fixture(scope='module')
def path(tmp_path_factory): return synth_galaxy10(tmp_path_factory.mktemp('d')/'s.h5', n=80, size=64, seed=0)


def test_workers_give_the_same_galaxies(path):
    alone, helped = (GalaxyDataLoaders.from_hdf5(path, bs=8, num_workers=n, progress=False) for n in (0, 2))
    for (a, ya), (b, yb) in zip(alone.valid, helped.valid):
        assert torch.equal(a, b) and torch.equal(ya, yb)


def test_reader_survives_pickling(path):
    dls = GalaxyDataLoaders.from_hdf5(path, progress=False)
    reader = pickle.loads(pickle.dumps(CutoutReader(dls.galaxies)))
    assert np.array_equal(reader(3).permute(1, 2, 0).numpy(), dls.galaxies.images[3])


def test_a_seed_repeats_training_batches(path):
    def batch():
        seed_everything(5)
        return GalaxyDataLoaders.from_hdf5(path, bs=8, progress=False).one_batch()
    (a, ya), (b, yb) = batch(), batch()
    assert torch.equal(a, b) and torch.equal(ya, yb)


def pictures(folder, **columns):
    "A table of 40 pictures"
    for i in range(40): Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8)).save(folder/f'{i}.png')
    return pd.DataFrame(dict(file=[f'{i}.png' for i in range(40)])).assign(**columns)


@pytest.mark.parametrize('gap', [False, True])
def test_numbers_are_names_where_the_names_are_given(gap, tmp_path):
    table = pictures(tmp_path, label=np.arange(40) % 3)
    if gap: table = table.astype(dict(label=float)).assign(label=lambda t: t.label.mask(t.index == 5))
    load = lambda classes: GalaxyDataLoaders.from_catalog(table, tmp_path, size=32, bad='skip', classes=classes, progress=False, device='cpu')
    with pytest.warns(UserWarning, match="0 is 'spiral', 1 is 'elliptical', 2 is 'merger'"): dls = load(['spiral', 'elliptical', 'merger'])
    assert dls.classes == ('spiral', 'elliptical', 'merger') and dls.catalog.label[:3].tolist() == ['spiral', 'elliptical', 'merger']
    assert dls.test_dl(table[:3], with_labels=True).one_batch()[1].tolist() == [0, 1, 2]
    with pytest.raises(GalaxyDataError, match='numbers 0 to 2.*2 names.*counted from 0'): load(['spiral', 'elliptical'])
    assert load([2, 0, 1]).classes == ('2', '0', '1') and load(None).test_dl(table[:3], with_labels=True).one_batch()[1].tolist() == [0, 1, 2]


def test_classes_that_differ_only_in_case_are_listed(tmp_path, capsys):
    dls = GalaxyDataLoaders.from_catalog(pictures(tmp_path, label=['Spiral', 'spiral ', ' spiral', 'merger']*10), tmp_path, size=32, progress=False, device='cpu')
    dls.summary()
    assert "'Spiral' and 'spiral' differ only in case or blanks" in capsys.readouterr().out and dls.classes == ('Spiral', 'merger', 'spiral')


def test_a_column_of_names_is_not_taken_for_classes(tmp_path):
    table = pictures(tmp_path, id=[f'NGC {i}' for i in range(40)])
    with pytest.raises(GalaxyDataError, match="column 'id' has 40 different values in 40 rows .NGC 0, NGC 1, NGC 10, NGC 11, NGC 12, ....") as e:
        GalaxyDataLoaders.from_catalog(table, tmp_path, y='id', size=32, progress=False)
    assert len(str(e.value)) < 250


def test_the_sample_that_comes_along():
    g = read_hdf5(Path(__file__).parents[1]/'data'/'sample.h5', progress=False)
    assert g.images.shape == (30, 64, 64, 3) and set(g.catalog.label.value_counts()) == {3}


def test_an_exported_learner_predicts_and_holds_no_galaxies(tmp_path):
    dls = GalaxyDataLoaders.from_hdf5(synth_galaxy10(tmp_path/'many.h5', n=400, size=64, seed=0), progress=False)
    learn = astroformer_learner(dls, 'astroformer_nano')
    learn.path = tmp_path
    galaxy = dls.galaxies.images[7]
    before = learn.predict(galaxy)[2]
    learn.export('learn.pkl')
    again = load_learner(tmp_path/'learn.pkl')
    assert torch.allclose(again.predict(galaxy)[2], before, atol=1e-5)
    assert list(again.dls.classes) == list(dls.classes) and again.dls.size == 64
    weights = sum(p.numel()*4 for p in learn.model.parameters())
    assert (tmp_path/'learn.pkl').stat().st_size < 1.5*weights + 1e6 < dls.galaxies.images.nbytes + weights


def test_a_packed_survey_of_flux_reads_files_like_its_own(tmp_path):
    table = pd.read_csv(synth_fits(tmp_path, n=20, size=32, seed=0, balance='uniform'))
    dls = GalaxyDataLoaders.from_fits(table, images=tmp_path, size=32, progress=False, device='cpu')
    packed = GalaxyDataLoaders.from_hdf5(pack(dls.galaxies, tmp_path/'packed.h5', progress=False), size=32, progress=False, device='cpu')
    assert packed.galaxies.unit == dls.galaxies.unit == 'nanomaggies' and packed.galaxies.reader.bands == dls.galaxies.bands
    new, = packed.test_dl([tmp_path/table.file[3]]).one_batch()
    assert torch.allclose(new, packed.test_dl([3]).one_batch()[0], atol=1e-5)
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path/'a.jpg')
    with pytest.raises(GalaxyDataError, match='a.jpg is not a FITS file'): packed.test_dl([tmp_path/'a.jpg']).one_batch()
    again = GalaxyDataLoaders.from_hdf5(pack(packed.galaxies, tmp_path/'again.h5', progress=False), size=32, progress=False, device='cpu')
    assert again.galaxies.reader == packed.galaxies.reader


def test_a_file_that_is_listed_twice_is_not_on_both_sides(tmp_path, capsys):
    table = pictures(tmp_path, label=['a', 'b']*20)
    table = pd.concat([table, table[:10].assign(label='a')], ignore_index=True)
    with pytest.warns(UserWarning, match=r'10 rows have the very pixels of another \(rows 0 and 40, for one\), and 5 images have two labels'):
        dls = GalaxyDataLoaders.from_catalog(table, tmp_path, size=32, progress=False, device='cpu')
    train, valid = (set(table.file[list(d.items)]) for d in (dls.train_ds, dls.valid_ds))
    assert not train & valid and dls.groups[0] == dls.groups[40]
    dls.summary()
    assert '40 groups kept whole: galaxies with the same pixels, the largest of 2; no positions on the sky are known' in capsys.readouterr().out
    placed = GalaxyDataLoaders.from_catalog(table.assign(ra=np.arange(50.), dec=0.), tmp_path, size=32, progress=False, device='cpu')
    assert placed.groups[0] == placed.groups[40] != placed.groups[1]


def test_an_own_file_is_not_called_by_the_names_of_galaxy10(tmp_path):
    with h5py.File(tmp_path/'own.h5', 'w') as f:
        f['images'], f['ans'] = np.random.default_rng(0).integers(0, 255, (20, 32, 32, 3), np.uint8), np.arange(20) % 2
    with pytest.warns(UserWarning, match='labels 0 to 1 and no names for them'): assert read_hdf5(tmp_path/'own.h5', 32, progress=False).classes == ('0', '1')
    assert read_hdf5(tmp_path/'own.h5', 32, 'disc, bulge', progress=False).classes == ('disc', 'bulge')


@pytest.mark.parametrize('wrong, words', [(dict(y='kind'), "no column 'kind'"), (dict(classes=['a']), "its class 'b' is not among those given"), (dict(valid=[50]), 'row 50 was named'),
                                          (dict(valid=[1, 1]), 'more than once'), (dict(bs=0), 'bs is 0'), (dict(valid_pct=2), 'valid_pct is 2'), (dict(seed='a'), "seed is 'a'"),
                                          (dict(augment=False), 'augment is False'), (dict(size='48'), "size is '48'"), (dict(ra='lon'), 'name both columns')])
@pytest.mark.parametrize('way', ['from_catalog', 'from_fits'])
def test_a_slip_in_the_call_is_said_before_files_are_read(way, wrong, words, tmp_path, monkeypatch):
    monkeypatch.setattr(images, 'read_image', None), monkeypatch.setattr(data_fits, 'read_fits', None)
    table = pd.DataFrame(dict(file=[f'{i}.png' for i in range(40)], label=['a', 'b']*20))
    with pytest.raises(GalaxyDataError, match=words): getattr(GalaxyDataLoaders, way)(table, tmp_path, **wrong, progress=False)


def test_rows_with_numbers_that_are_none_can_be_left_out(tmp_path):
    table = pictures(tmp_path, label=['a', 'b']*20, right=[f'{i}.5' for i in range(40)], north=0., pxscale=.4).astype(object)
    table.loc[3, 'right'], table.loc[4, 'north'], table.loc[5, 'pxscale'], table.loc[6, 'right'], table.loc[7, 'label'] = 'east', 91, 'fine', np.nan, np.nan
    table.to_csv(tmp_path/'t.csv', index=False)
    load = lambda **kwargs: GalaxyDataLoaders.from_catalog(tmp_path/'t.csv', size=32, progress=False, device='cpu', ra='right', dec='north', **kwargs)
    with pytest.raises(GalaxyDataError, match="4 of 40 rows .*row 3: ra is 'east', expected decimal degrees from 0 to 360"): load()
    dls = load(bad='skip')
    assert dls.galaxies.skipped.row.tolist() == [3, 4, 5, 7] and len(dls.catalog) == 36 and dls.catalog.ra.iloc[:2].tolist() == [.5, 1.5] and dls.catalog.pxscale.dtype == float


@pytest.mark.parametrize('kind', ['fits', 'ecsv', 'vot', 'parquet'])
def test_catalogues_of_many_formats(kind, tmp_path):
    table = pictures(tmp_path, label=['a', 'b']*20, RA_deg=np.arange(40.), DEC_deg=0.)
    if kind == 'parquet': table.to_parquet(tmp_path/'t.parquet')
    else: Table.from_pandas(table).write(tmp_path/f't.{kind}', **dict(format='votable') if kind == 'vot' else {})
    dls = GalaxyDataLoaders.from_catalog(tmp_path/f't.{kind}', size=32, progress=False, device='cpu')
    assert dls.classes == ('a', 'b') and dls.catalog.file.tolist() == table.file.tolist() and len(set(dls.groups)) == 40 and dls.separation == 60


@pytest.mark.parametrize('gap', ['', ' ', b''])
def test_an_empty_word_is_no_class(gap, tmp_path):
    table = pictures(tmp_path, label=[gap, 'merger', 'spiral', 'spiral']*10)
    if isinstance(gap, bytes): table['label'] = [c if isinstance(c, bytes) else c.encode() for c in table.label]
    load = lambda bad: GalaxyDataLoaders.from_catalog(table, tmp_path, size=32, bad=bad, progress=False, device='cpu')
    with pytest.raises(GalaxyDataError, match='10 of 40 rows .*row 0: no label'): load('raise')
    dls = load('skip')
    assert dls.classes == ('merger', 'spiral') and set(dls.galaxies.skipped.problem) == {'no label'}


def test_a_column_that_is_there_twice(tmp_path):
    table = pictures(tmp_path, label=['merger', 'spiral']*20)
    with pytest.raises(GalaxyDataError, match="two columns 'label'"): GalaxyDataLoaders.from_catalog(pd.concat([table, table[['label']]], axis=1), tmp_path, progress=False)


@pytest.mark.parametrize('label, said', [(pd.Timestamp('2020-01-01'), "Timestamp"), (['a'], "'a'"), (float('inf'), "inf")])
def test_a_label_that_is_no_class_is_one_sentence(tmp_path, label, said):
    table = pictures(tmp_path, label=list('ab')*20).astype(dict(label=object))
    table.at[7, 'label'] = label
    load = lambda table, **kwargs: GalaxyDataLoaders.from_catalog(table, tmp_path, size=32, progress=False, device='cpu', **kwargs)
    with pytest.raises(GalaxyDataError, match=f'row 7: its class is .*{said}.*, expected a name or a number'): load(table)
    assert load(table, bad='skip').galaxies.skipped.row.tolist() == [7]
    with pytest.raises(GalaxyDataError, match=f'40 of 40 rows.*{said}'): load(table.assign(label=pd.Series([label]*40)))
    survey = images.read_catalog(table.assign(label=list('ab')*20), tmp_path, size=32, progress=False)
    survey.catalog['label'] = pd.Series([label, 'a']*20, dtype=object)
    with pytest.raises(GalaxyDataError, match='row 0 .*is not among the classes'): GalaxyDataLoaders.from_galaxies(survey, device='cpu')


def test_one_picture_many_times_is_called_copies(tmp_path):
    table = pictures(tmp_path, label=list('ab')*20).assign(file='3.png')
    with pytest.raises(GalaxyDataError, match='all 40 images are copies of each other'): GalaxyDataLoaders.from_catalog(table, tmp_path, size=32, progress=False)


def test_blank_pictures_of_a_file_are_named(tmp_path, capsys):
    path = synth_galaxy10(tmp_path/'s.h5', n=80, size=32, seed=0)
    with h5py.File(path, 'a') as f:
        pixels = f['images'][:]
        pixels[5], pixels[77] = 0, 255
        f['images'][:] = pixels
    with pytest.warns(UserWarning, match='2 images of .*s.h5 are blank .rows 5, 77.'): dls = GalaxyDataLoaders.from_hdf5(path, size=32, progress=False, device='cpu')
    dls.summary()
    assert '2 blank images (rows 5, 77)' in capsys.readouterr().out
    with h5py.File(path, 'a') as f: f['images'][:] = 0
    with pytest.raises(GalaxyDataError, match='all 80 images are copies of each other'), pytest.warns(UserWarning, match='80 images'):
        GalaxyDataLoaders.from_hdf5(path, size=32, progress=False, device='cpu')
