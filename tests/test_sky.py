"""Groups and splits under any catalogue: nothing that shares sky is ever parted."""
import itertools, warnings
from pathlib import Path

import numpy as np, pandas as pd, pytest
from astropy import units as u
from astropy.coordinates import SkyCoord, search_around_sky
from hypothesis import assume, given, settings, strategies as st

from astroformer_astro.core import GalaxyDataError
from astroformer_astro.data.block import GalaxyDataLoaders
from astroformer_astro.data.images import GalaxySet
from astroformer_astro.data.sky import (_deal, _joined, cite_split, cutout_separation, duplicates, k_folds, label_subsets, leak_report, load_split, save_split,
                                        sky_groups, split_by_column, split_galaxies)

real = Path(__file__).parent.parent.parent/'shared'/'data'/'ngc_sdss'/'labels.csv'
quick = settings(max_examples=30, deadline=None)


@st.composite
def skies(draw, least=2, most=150):
    "Right ascension, declination and a separation: from lonely to crowded, in the plane and at the pole, some places taken twice"
    n, rng = draw(st.integers(least, most)), np.random.default_rng(draw(st.integers(0, 2**32)))
    width, separation = 10**draw(st.floats(-3, 1)), 10**draw(st.floats(-1, 4))
    ra = draw(st.sampled_from([0., 150., 359.99])) + rng.normal(0, width, n)
    dec = np.clip(draw(st.sampled_from([-90., 0., 40., 89.9])) + rng.normal(0, width, n), -90, 90)
    again = rng.random(n) < draw(st.sampled_from([0, .2]))
    return np.where(again, ra[0], ra) % 360, np.where(again, dec[0], dec), separation


@st.composite
def surveys(draw):
    "A catalogue of two to four classes with its groups, that can be split"
    ra, dec, separation = draw(skies(least=20))
    label = np.array(list('abcd'))[np.arange(len(ra)) % draw(st.integers(2, 4))]
    groups = sky_groups(ra, dec, separation)
    assume(len(set(groups)) >= 5)
    return pd.DataFrame(dict(ra=ra, dec=dec, label=label)), groups, separation


def possible(split, *args, **kwargs):
    "The result of `split`, unless the galaxies lie so that there is none"
    try: return split(*args, **kwargs)
    except GalaxyDataError as e:
        assert any(s in str(e) for s in ('in one group of the sky', 'these galaxies allow', 'would be held out')), e
        assume(False)


def all_links(ra, dec, separation):
    "Every pair, and no object closer to the separation than rounding can tell"
    c = SkyCoord(ra, dec, unit='deg')
    i, j, apart, _ = search_around_sky(c, c, 1.001*separation*u.arcsec)
    assume((abs(apart.arcsec/separation - 1) > 1e-7).all())
    return np.array([i, j])[:, apart.arcsec < separation]


@settings(max_examples=100, deadline=None)
@given(skies())
def test_groups_are_those_of_all_pairs(sky):
    assert np.array_equal(sky_groups(*sky), _joined(len(sky[0]), all_links(*sky)))


@quick
@given(skies(), st.integers(0, 2**32), st.floats(0, 360))
def test_groups_do_not_depend_on_order_or_meridian(sky, seed, turn):
    ra, dec, separation = sky
    all_links(*sky)
    groups, order = sky_groups(*sky), np.random.default_rng(seed).permutation(len(ra))
    same = lambda g: (g[:, None] == g).tolist()
    assert same(sky_groups(ra[order], dec[order], separation)) == same(groups[order])
    assert same(sky_groups((ra + turn) % 360, -dec, separation)) == same(groups)


@quick
@given(skies())
def test_duplicates_are_all_pairs(sky):
    i, j = all_links(*sky)
    pairs = duplicates(*sky)
    assert set(zip(pairs.i, pairs.j)) == set(zip(i[i < j], j[i < j])) and len(pairs) == (i < j).sum()


def test_a_crowd_fits_into_memory():
    "Listed, the pairs of these fill 40 GB"
    rng = np.random.default_rng(0)
    ra, dec = 150 + rng.uniform(0, .001, 50_000), rng.uniform(0, .001, 50_000)
    assert sky_groups(ra, dec, 60).max() == 0
    with pytest.raises(GalaxyDataError, match='1,249,975,000 pairs'): duplicates(ra, dec, 60)


def test_dense_clumps_just_apart_stay_apart():
    x, y = (a.ravel() for a in np.meshgrid(np.arange(8), np.arange(8)))
    offset = np.random.default_rng(0).uniform(-3, 3, (2, 64*20))
    ra, dec = (np.repeat(p, 20)*70 + o for p, o in zip((x, y), offset))
    assert np.array_equal(sky_groups(ra/3600 + 10, dec/3600, 60), np.repeat(np.arange(64), 20))
    assert sky_groups(ra/3600 + 10, dec/3600, 70).max() == 0


@settings(max_examples=100, deadline=None)
@given(skies(), st.integers(0, 2**32))
def test_each_galaxy_can_have_its_own_separation(sky, seed):
    "Two are linked where they are closer than the mean of theirs"
    ra, dec, separation = sky
    own = separation*10**np.random.default_rng(seed).uniform(-1, 1, len(ra))
    c = SkyCoord(ra, dec, unit='deg')
    i, j, apart, _ = search_around_sky(c, c, 1.001*own.max()*u.arcsec)
    mean = (own[i] + own[j])/2
    assume((abs(apart.arcsec/mean - 1) > 1e-7).all())
    i, j = i[near := apart.arcsec < mean], j[near]
    assert np.array_equal(sky_groups(ra, dec, own), _joined(len(ra), np.array([i, j])))
    half = np.arange(len(ra)) % 2 == 0
    report = leak_report(ra, dec, np.flatnonzero(half), np.flatnonzero(~half), own)
    assert report.pairs == (i < j).sum() and set(report.leaked) == set(i[~half[i] & half[j]])


def test_one_wide_cutout_in_a_crowd_fits_into_memory():
    rng = np.random.default_rng(0)
    ra, dec = 150 + rng.uniform(0, .001, 20_000), rng.uniform(0, .001, 20_000)
    assert sky_groups(ra, dec, np.where(np.arange(20_000) == 7, 900., 60)).max() == 0


def wide_and_narrow(**columns):
    "Pairs 100 arcsec apart at declination 0: the cut-outs of the first pair are 80 arcsec wide, of the second 40; then lonely galaxies"
    ra = np.r_[10, 10 + 100/3600, 20, 20 + 100/3600, 30:46]
    cat = pd.DataFrame(dict(ra=ra, dec=0., label=list('ab')*10, pxscale=[5., 5., 2.5, 2.5] + [1.]*16)).assign(**columns)
    return GalaxySet(np.random.default_rng(0).integers(0, 255, (20, 16, 16, 3), np.uint8), cat, ('a', 'b'))


def test_the_loaders_keep_cutouts_that_share_sky_together(capsys):
    dls = GalaxyDataLoaders.from_galaxies(wide_and_narrow(), valid_pct=.5, device='cpu')
    assert dls.groups[0] == dls.groups[1] and dls.groups[2] != dls.groups[3]
    dls.summary()
    assert 'closer than 60 to 113 arcsec (the diagonals of their cut-outs, 60 at least)' in (said := capsys.readouterr().out) and 'the largest of 2' in said
    plain = GalaxyDataLoaders.from_galaxies(wide_and_narrow(), valid_pct=.5, separation=60, device='cpu')
    assert len(set(plain.groups)) == 20
    plain.summary()
    assert 'closer than 60 arcsec (as asked)' in capsys.readouterr().out
    GalaxyDataLoaders.from_galaxies(wide_and_narrow(pxscale=np.nan), valid_pct=.5, device='cpu').summary()
    assert 'closer than 60 arcsec (no pixel scale is known)' in capsys.readouterr().out


def test_without_a_pixel_scale_the_separation_is_a_minute():
    for pxscale in (np.nan, -9., np.inf): assert cutout_separation(wide_and_narrow(pxscale=pxscale)) == 60
    g = wide_and_narrow()
    g.catalog = g.catalog.drop(columns='pxscale')
    assert cutout_separation(g) == 60 and len(set(GalaxyDataLoaders.from_galaxies(g, device='cpu').groups)) == 20


def whole(groups, *parts):
    for a, b in itertools.combinations(parts, 2): assert not set(groups[a]) & set(groups[b])


@quick
@given(surveys(), st.sampled_from([.1, .2, .5]), st.integers(0, 1000))
def test_groups_never_straddle_a_split(survey, share, seed):
    cat, groups, separation = survey
    train, valid = possible(split_galaxies, cat.label, groups, share, seed)
    whole(groups, train, valid)
    assert sorted([*train, *valid]) == list(range(len(cat))) and len(train) and len(valid)
    assert len(leak_report(cat.ra, cat.dec, train, valid, separation).leaked) == 0


@quick
@given(surveys(), st.integers(2, 5), st.integers(0, 1000))
def test_every_galaxy_is_validated_once(survey, k, seed):
    cat, groups, _ = survey
    folds = possible(k_folds, cat.label, groups, k, seed)
    whole(groups, *(valid for _, valid in folds))
    assert sorted(np.concatenate([valid for _, valid in folds])) == list(range(len(cat)))
    for train, valid in folds: assert len(valid) and sorted([*train, *valid]) == list(range(len(cat)))


@quick
@given(surveys(), st.floats(.1, .9), st.booleans())
def test_groups_never_straddle_a_border(survey, quantile, words):
    cat, groups, separation = survey
    far = cat.dec > cat.dec.quantile(quantile)
    cat = cat.assign(side=np.where(far, 'far', 'near'))
    where = dict(column='side', values='far') if words else dict(column='dec', above=cat.dec.quantile(quantile))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        train, valid = possible(split_by_column, cat, separation=separation, **where)
    whole(groups, train, valid)
    assert set(valid) == set(np.flatnonzero(far)) and not far[train].any()
    left_out = len(cat) - len(train) - len(valid)
    assert left_out == np.isin(groups[~far], groups[far]).sum()
    assert [int(str(w.message).split()[0]) for w in said] == [left_out]*bool(left_out)


def test_a_large_survey_is_dealt_evenly_and_whole():
    rng = np.random.default_rng(0)
    groups = np.r_[np.arange(12_000), np.repeat(np.arange(12_000, 14_000), 2), [14_000]*30]
    labels = rng.choice(list('abc'), len(groups), p=[.7, .28, .02])
    fold = _deal(labels, groups, 5, 3)
    assert len(set(zip(groups, fold))) == len(set(groups))
    for c in 'abc': assert np.ptp(np.bincount(fold[labels == c])) <= 12
    assert np.ptp(np.bincount(fold)) <= 12
    assert np.array_equal(fold, _deal(labels, groups, 5, 3)) and not np.array_equal(fold, _deal(labels, groups, 5, 4))


@quick
@given(st.lists(st.integers(0, 3), min_size=8, max_size=60), st.integers(0, 1000), st.data())
def test_subsets_are_nested_balanced_and_of_the_rows(labels, seed, data):
    labels = np.array(list('abcd'))[labels]
    rows = np.flatnonzero(data.draw(st.lists(st.booleans(), min_size=len(labels), max_size=len(labels))))
    assume(len(rows))
    names, counts = np.unique(labels[rows], return_counts=True)
    subsets = label_subsets(labels, range(1, counts.min() + 1), rows, seed)
    for n, chosen in subsets.items():
        assert len(set(chosen)) == len(chosen) == n*len(names) and set(chosen) <= set(rows)
        assert pd.Series(labels[chosen]).value_counts().to_dict() == dict.fromkeys(names, n)
        assert set(chosen) <= set(subsets.get(n + 1, chosen))
    assert all(np.array_equal(a, b) for a, b in zip(subsets.values(), label_subsets(labels, range(1, counts.min() + 1), rows[::-1], seed).values()))
    with pytest.raises(GalaxyDataError, match='to draw from'): label_subsets(labels, counts.min() + 1, rows, seed)


@quick
@given(skies(most=8), st.data())
def test_the_expected_leak_is_the_mean_over_all_splits(sky, data):
    ra, dec, separation = sky
    n = len(ra)
    held = data.draw(st.integers(1, n - 1))
    splits = [leak_report(ra, dec, np.setdiff1d(range(n), v), v, separation) for v in itertools.combinations(range(n), held)]
    assert np.isclose(splits[0].expected, np.mean([len(s.leaked) for s in splits]))


@settings(max_examples=15, deadline=None)
@given(surveys(), st.integers(0, 2**32), st.sampled_from(['position', 'float32', 'id']), st.data())
def test_a_saved_split_is_found_in_any_order(tmp_path_factory, survey, seed, by, data):
    cat, groups, separation = survey
    train, valid = possible(split_galaxies, cat.label, sky_groups(cat.ra, cat.dec, max(separation, 2)))
    id_column = None
    if by == 'id':
        words = st.text(st.characters(codec='utf-8', categories=['L', 'N', 'P', 'S', 'Zs']), min_size=1).map(str.strip).filter(bool)
        cat, id_column = cat.assign(name=data.draw(st.lists(words, min_size=len(cat), max_size=len(cat), unique=True))), 'name'
    path = save_split(tmp_path_factory.mktemp('s')/'s.ecsv', cat, dict(train=train, valid=valid), id_column)
    order = np.random.default_rng(seed).permutation(len(cat))
    other = cat.iloc[order].astype(dict(ra=np.float32, dec=np.float32) if by == 'float32' else {})
    found = load_split(path, other)
    assert set(order[found['train']]) == set(train) and set(order[found['valid']]) == set(valid)
    again = save_split(path.with_name('again.ecsv'), cat.iloc[order], found, id_column)
    if by != 'float32': assert cite_split(path).split(': ')[1] == cite_split(again).split(': ')[1]
    with pytest.raises(GalaxyDataError, match='other galaxies'): load_split(path, cat[1:])


def test_ids_that_are_numbers_keep_their_digits(tmp_path):
    cat = pd.DataFrame(dict(objid=[1237648720693755918, 1237648720693755919, 7], ra=[1., 2, 3], dec=[0., 0, 0]))
    path = save_split(tmp_path/'s', cat, dict(train=[0, 2], valid=[1]), 'objid')
    assert load_split(path, cat[::-1])['valid'].tolist() == [1]
    assert load_split(path, cat.astype(dict(objid=str)))['train'].tolist() == [0, 2]


def test_blanks_around_an_id_do_not_count(tmp_path):
    cat = pd.DataFrame(dict(name=[' NGC 1', 'NGC 2  ', '"x", #3']))
    path = save_split(tmp_path/'s', cat, dict(train=[0, 2], valid=[1]), 'name')
    assert load_split(path, cat.assign(name=cat.name.str.strip()))['train'].tolist() == [0, 2]


@pytest.mark.parametrize('what, text', [('an empty file', ''), ('a plain table', 'a,b\n1,2\n'), ('bytes', '\0\1'),
                                        ('another ECSV', '# %ECSV 1.0\n# ---\n# datatype:\n# - {name: a, datatype: int64}\n# schema: astropy-2.0\na\n1\n')])
def test_what_is_no_split_is_refused_in_a_sentence(tmp_path, what, text):
    (tmp_path/'s.ecsv').write_text(text)
    for read in (cite_split, lambda p: load_split(p, pd.DataFrame(dict(ra=[1.], dec=[1.])))):
        with pytest.raises(GalaxyDataError, match='give a file written by save_split'): read(tmp_path/'s.ecsv')


def test_nothing_is_written_where_galaxies_cannot_be_told_apart(tmp_path):
    cat = pd.DataFrame(dict(ra=[5., 5, 7], dec=[1., 1, np.nan]))
    for rows in ([0, 2], [0]):
        with pytest.raises(GalaxyDataError, match='id_column='): save_split(tmp_path/'s', cat[:len(rows) + 1], dict(train=rows))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not real.exists(), reason=f'real galaxies are not at {real}')
def test_real_cutouts_share_no_sky_across_a_split():
    "Large galaxies have large cut-outs: at one separation for all, cut-outs up to 18 arcmin wide would straddle the split"
    cat = pd.read_csv(real).assign(label=lambda c: c.coarse4)
    side, own = 256*cat.pxscale.to_numpy(), cutout_separation(GalaxySet(np.broadcast_to(np.uint8(0), (len(cat), 256, 256, 3)), cat, ()))
    c = SkyCoord(cat.ra, cat.dec, unit='deg')
    i, j, _, _ = search_around_sky(c, c, 2*side.max()*u.arcsec)
    across, along = (abs(o.arcsec) for o in c[i].spherical_offsets_to(c[j]))
    shared = np.maximum(across, along) < (side[i] + side[j])/2
    torn = {}
    for name, separation in dict(minute=60, own=own).items():
        groups = sky_groups(cat.ra, cat.dec, separation)
        train, valid = split_galaxies(cat.label, groups)
        torn[name] = len(set(i[shared & np.isin(i, valid) & np.isin(j, train)]))
        assert len(valid) == 546 and abs(cat.label[valid].value_counts(normalize=True) - cat.label.value_counts(normalize=True)).max() < .002
        assert len(leak_report(cat.ra, cat.dec, train, valid, separation).leaked) == 0
    assert torn == dict(minute=16, own=0) and np.bincount(groups).max() < 10


@pytest.mark.skipif(not real.exists(), reason=f'real galaxies are not at {real}')
def test_real_galaxies():
    cat = pd.read_csv(real)
    groups = sky_groups(cat.ra, cat.dec)
    train, valid = split_galaxies(cat.coarse4, groups)
    report = leak_report(cat.ra, cat.dec, train, valid)
    assert (report.pairs, report.linked, report.groups, report.largest, len(report.leaked)) == (49, 89, 42, 4, 0)
    assert 14 < report.expected < 15
    assert all(len(leak_report(cat.ra, cat.dec, *fold).leaked) == 0 for fold in k_folds(cat.coarse4, groups))
    south, north = split_by_column(cat, 'dec', above=32.375)
    assert (len(south), len(north)) == (2015, 715)
    with pytest.raises(GalaxyDataError, match="'redshift' is empty in 181 rows"): split_by_column(cat, 'redshift', above=.02)


def test_a_split_says_that_labels_have_changed(tmp_path):
    cat = pd.DataFrame(dict(ra=np.arange(20.), dec=0., label=list('ab')*10))
    save_split(path := tmp_path/'s.ecsv', cat, dict(train=range(15), valid=range(15, 20)))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        parts = load_split(path, cat.iloc[::-1].reset_index(drop=True))
        load_split(path, cat.drop(columns='label'))
    assert parts['valid'].tolist() == list(range(5))
    with pytest.warns(UserWarning, match='10 of the 20 galaxies have another label than in .*s.ecsv .*row 1 is .z., was .b.'):
        load_split(path, cat.replace(dict(label=dict(b='z'))))
