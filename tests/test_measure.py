"Maps as measurements, on maps whose numbers can be worked out by hand"
import json
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest
from astropy.io import fits
from astropy.wcs import WCS
from hypothesis import given, settings, strategies as st
from torch.nn import Linear
from astroformer_astro.core import GalaxyDataError
from astroformer_astro.data.fits import read_fits_catalog
from astroformer_astro.interpret.attribution import Attribution
from astroformer_astro.interpret.measure import (aligned_map, attribution_table, azimuthal_profile, cutout_wcs, map_measures, map_origin, measured_maps, picture_wcs, radial_profile, read_map,
                                                 stack_maps, write_map)
from astroformer_astro.interpret.shape import GalaxyShape

SIZE = 128, 128
shapes = st.builds(GalaxyShape, y=st.floats(58, 70), x=st.floats(58, 70), radius=st.floats(8, 14), ratio=st.floats(.4, 1), angle=st.floats(0, 179.9))


def disc(shape, within=1.): return (shape.radius_map(SIZE) < within).astype(float)


@settings(max_examples=25, deadline=None)
@given(shapes)
def test_exponential_disc(shape):
    "exp(-r) holds 1 - (1 + r) exp(-r) of its light within r, and half of it within 1.678"
    heatmap = np.exp(-shape.radius_map(SIZE)*4)             # scale length of R_e/4, so that nothing is off the cut-out
    found = map_measures(heatmap, shape)
    assert found['inside_re'] == pytest.approx(1 - 5*np.exp(-4), abs=.02)
    assert found['half_radius'] == pytest.approx(1.678/4, abs=.06)
    assert found['offset'] < .02 and found['asymmetry'] < .1 and found['against'] == 0
    p = radial_profile(heatmap, shape, np.arange(0, 3, .5))
    assert p['mean'].to_numpy()[1:] == pytest.approx(np.exp(-4*p.radius.to_numpy()[1:]), rel=.35) and (p['mean'] == p.absolute).all()


@settings(max_examples=25, deadline=None)
@given(shapes, st.floats(-6, 6), st.floats(-6, 6))
def test_offset_is_the_distance_of_the_centroid(shape, dy, dx):
    y, x = np.indices(SIZE)
    blob = np.exp(-((y - shape.y - dy)**2 + (x - shape.x - dx)**2)/8)
    found = map_measures(-blob, shape, pxscale=.4)
    assert found['offset']*shape.radius == pytest.approx(np.hypot(dy, dx), abs=1e-3)
    assert found['offset_arcsec'] == pytest.approx(.4*np.hypot(dy, dx), abs=1e-3) and found['against'] == pytest.approx(1)
    assert found['total'] == pytest.approx(-8*np.pi, rel=1e-3)


def test_asymmetry_of_one_sided_odd_and_even_maps():
    shape = GalaxyShape(63.5, 63.5, 12, 1, 0)
    y, x = np.indices(SIZE) - 63.5
    assert map_measures(disc(shape)*(x > 0), shape)['asymmetry'] == pytest.approx(1)
    assert map_measures(disc(shape)*np.sign(x), shape)['asymmetry'] == pytest.approx(1)
    assert map_measures(disc(shape)*x*y, shape)['asymmetry'] == pytest.approx(0, abs=1e-6)
    assert map_measures(disc(shape)*(1 + .5*np.sign(x)), shape)['asymmetry'] == pytest.approx(.5)


@settings(max_examples=25, deadline=None)
@given(shapes, st.sampled_from([0, 90, 180, 270]))
def test_azimuth_is_counted_from_the_major_axis(shape, where):
    wedge = np.abs((shape.azimuth_map(SIZE) - where + 180) % 360 - 180) < 15
    p = azimuthal_profile(wedge.astype(float), shape, bins=12, outer=3)
    assert set(p.azimuth[p['mean'] > .3]) == {(where - 15) % 360, (where + 15) % 360}
    assert p.pixels.sum() == (shape.radius_map(SIZE) < 3).sum()


def test_rings_without_pixels_are_no_numbers():
    p = radial_profile(np.ones((8, 8)), GalaxyShape(3.5, 3.5, 2, 1, 0), [0, .1, 1, 9, 10])
    assert p.pixels.tolist()[0] == p.pixels.tolist()[-1] == 0 and np.isnan(p['mean'].iloc[[0, -1]]).all() and p['mean'].iloc[1] == 1
    assert np.isnan(radial_profile(np.zeros((8, 8)), GalaxyShape(3.5, 3.5, 2, 1, 0), [0, 9]).inside).all()


@settings(max_examples=20, deadline=None)
@given(shapes)
def test_aligned_galaxies_lie_on_each_other(shape):
    "Half of the disc on one side of the major axis comes out on the same side at any angle, and face-on it is round"
    one_side = disc(shape, 2)*(shape.azimuth_map(SIZE) < 180)
    upright = aligned_map(one_side, shape, 64, 3, face_on=True)
    y, x = np.indices((64, 64)) - 31.5
    wanted = (np.hypot(y, x) < 2*64/6) & (x < 0)
    assert ((upright > shape.radius**2*shape.ratio/2) == wanted).mean() > .96


def test_a_stack_of_two_by_hand():
    shape = GalaxyShape(63.5, 63.5, 12, 1, 0)
    found = stack_maps([(disc(shape, 5), shape, 'a'), (3*disc(shape, 5), shape, 'a'), (0*disc(shape), shape, 'b')], size=8, extent=2, equal=False)
    assert found['a'].n == 2 and found['a'].mean == pytest.approx(np.full((8, 8), 2*144.)) and found['a'].spread == pytest.approx(np.full((8, 8), 144.))
    assert (found['b'].mean == 0).all() and (found['b'].counts == 1).all()
    equal = stack_maps([(disc(shape, 5), shape, 'a'), (3*disc(shape, 5), shape, 'a')], size=8, extent=2)
    assert equal['a'].spread == pytest.approx(np.zeros((8, 8)), abs=1e-4)


def explained(seed=0):
    rng = np.random.default_rng(seed)
    return Attribution(rng.random((6, 8, 3), np.float32), dict(spiral=.6, elliptical=.4), 'spiral', values=rng.normal(size=(3, 6, 8)).astype(np.float32), target='spiral', method='occlusion', baseline='sky',
                       delta=None, against='elliptical', reference=rng.random((3, 6, 8), np.float32), seconds=.5, pictures=7)


@pytest.mark.parametrize('ending', ['.fits', '.npz'])
def test_nothing_is_lost_on_disk(tmp_path, ending):
    a, wcs = explained(), picture_wcs((6, 8), 150, 2, .5)
    b = read_map(write_map(a, tmp_path/f'a{ending}', wcs if ending == '.fits' else None))
    for k, v in vars(a).items():
        if isinstance(v, np.ndarray): np.testing.assert_array_equal(getattr(b, k), v)
        else: assert getattr(b, k) == v


def test_the_fits_map_lies_on_the_sky(tmp_path):
    "The brightest pixel of the map is at its world coordinates: row 0 of a picture is the northernmost"
    a, wcs = explained(), picture_wcs((6, 8), 150, 2, .5)
    a.values[:] = 0; a.values[:, 0, 7] = 1                   # upper right: north and west of the centre
    with fits.open(write_map(a, tmp_path/'a.fits', wcs)) as hdus:
        row, column = np.unravel_index(hdus[0].data.argmax(), (6, 8))
        ra, dec = WCS(hdus[0].header).pixel_to_world_values(column, row)
        assert hdus[0].data.max() == 3 and hdus[0].header['BUNIT'] == 'logit' and json.loads(hdus[0].header['RECORD'])['against'] == 'elliptical'
    assert (dec - 2)*3600 == pytest.approx(2.5*.5, rel=1e-3) and (ra - 150)*3600*np.cos(np.radians(2)) == pytest.approx(-3.5*.5, rel=1e-3)


def test_the_header_names_galaxy_bands_and_weights(tmp_path):
    "A card a plane in the order of the planes, one for the sum; nothing where nothing is known; and the file reads as before"
    a = explained()
    b = read_map(write_map(a, tmp_path/'a.fits', None, 'NGC 1300\t(arm)', ('g', 'r', 'z'), 'deadbeef'))
    assert (b.values == a.values).all() and b.against == a.against
    with fits.open(tmp_path/'a.fits') as hdus:
        hdus.verify('exception')
        assert [hdus[0].header[k] for k in ('OBJECT', 'BAND1', 'WEIGHTS')] == ['NGC 1300\\t(arm)', 'g+r+z', 'deadbeef']
        assert {h.name: [h.header.get(f'BAND{i}') for i in (1, 2, 3)] for h in hdus[1:]} == dict(IMAGE=[None]*3, VALUES=['g', 'r', 'z'], REFERENCE=['g', 'r', 'z'])
    with fits.open(write_map(a, tmp_path/'b.fits')) as hdus: assert not {'OBJECT', 'BAND1', 'WEIGHTS'} & set(hdus[0].header)


difficult = st.text() | st.text("'& /a\\\"", max_size=200) | st.sampled_from(["Galaxies with 'rings' / arcs", "wendell's a' / b", '&'*70,
    "/data/O'Neill's survey/cut-outs of 'field 3' / tile 12/galaxy number 00012345.fits"])

@settings(max_examples=80, deadline=None)
@given(name=difficult, first=difficult, second=difficult)
def test_any_text_comes_back_from_fits(tmp_path_factory, name, first, second):
    "A class exactly; a name as it is where it is plain and fits a card, and otherwise as it is or as JSON escapes it; FITS drops spaces at the end"
    a = explained()
    a.probabilities, a.target, a.against = {first: .6, second: .4}, first, second
    path = write_map(a, tmp_path_factory.mktemp('any')/'a.fits', name=name, bands=(name, first, second))
    b = read_map(path)
    assert (b.probabilities, b.target, b.against) == (a.probabilities, first, second) and (b.values == a.values).all()
    found, wanted = fits.getheader(path).get('OBJECT'), name.rstrip(' ')
    if not name.strip(): assert found is None
    elif wanted.isascii() and wanted.isprintable() and len(wanted) <= 68 and not set(wanted) & set("'&"): assert found == wanted
    else: assert found == wanted or json.loads(f'"{found}"').rstrip(' ') == wanted


def test_files_that_are_no_maps(tmp_path):
    with pytest.raises(GalaxyDataError, match="ends in '.png'; a map is written as .fits or .npz"): write_map(explained(), tmp_path/'a.png')
    np.savez(tmp_path/'b.npz', x=1); (tmp_path/'c.fits').write_text('no')
    for name in 'b.npz', 'c.fits', 'gone.fits':
        with pytest.raises(GalaxyDataError, match='is not a map as `write_map` leaves it'): read_map(tmp_path/name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['b.npz', 'c.fits']


class Told:
    "An explainer whose maps are known: a disc of one, centred; or what it cannot explain"
    class learn:
        class dls: catalog = pd.DataFrame(dict(pxscale=[.5, .5, .5]))
    def attribute(self, item, **asked):
        if item == 2: raise GalaxyDataError('this one is cut off')
        y, x = np.indices((64, 64)) - 31.5
        galaxy = np.exp(-np.hypot(y, x)/5)[..., None]*np.ones(3)
        return Attribution(galaxy, dict(a=.9, b=.1), 'a', values=(np.hypot(y, x) < 20)[None].astype(float)*(1 + item), target='a', method='occlusion', baseline='sky')


def test_a_catalogue_becomes_a_table(tmp_path):
    table = attribution_table(Told(), [0, 1, 2], out=tmp_path/'t.csv', progress=False)
    assert table.total.tolist()[:2] == pytest.approx([1256, 2512], abs=20) and table['inside_re'].iloc[0] == table['inside_re'].iloc[1] and table.re_arcsec.iloc[0] == .5*table.re_px.iloc[0]
    assert table.problem[:2].isna().all() and table.problem.iloc[2] == 'this one is cut off' and np.isnan(table.total.iloc[2])
    assert len(pd.read_csv(tmp_path/'t.csv')) == 3 and len(list(measured_maps(Told(), []))) == 0 == len(attribution_table(Told(), [], progress=False))
    with pytest.raises(GalaxyDataError, match="ends in '.txt'"): attribution_table(Told(), [0], out=tmp_path/'t.txt', progress=False)
    with pytest.raises(GalaxyDataError, match='none of the 1 galaxies could be measured; of the first: this one is cut off'): attribution_table(Told(), [2], progress=False)


@pytest.mark.parametrize('angle, handed', [(0, 1), (30, 1), (200, 1), (30, -1)])
def test_a_map_of_a_fits_cut_out_lies_where_its_galaxy_lies(tmp_path, angle, handed):
    "A star in a turned, or mirrored, image; the map that has it as its highest pixel is written with the coordinates of the star"
    wcs, c, s = WCS(naxis=2), np.cos(np.radians(angle)), np.sin(np.radians(angle))
    wcs.wcs.ctype, wcs.wcs.crval, wcs.wcs.crpix = ['RA---TAN', 'DEC--TAN'], [150, 2], [20.5, 20.5]
    wcs.wcs.cd = np.array([[-c*handed, s], [s*handed, c]])/3600
    data = np.random.default_rng(0).normal(size=(40, 40)).astype(np.float32)
    data[25, 10] = 500
    for k in range(2): fits.PrimaryHDU(data, wcs.to_header()).writeto(tmp_path/f'{k}.fits')
    galaxies = read_fits_catalog(pd.DataFrame(dict(file=['0.fits', '1.fits'], label=['a', 'b'])), tmp_path, size=40, unit='keep', progress=False)
    learn = SimpleNamespace(dls=SimpleNamespace(galaxies=galaxies, catalog=galaxies.catalog))
    pixels = np.moveaxis(galaxies.images[1], -1, 0)
    a = Attribution(np.zeros((40, 40, 3), np.float32), {'a': 1.}, None, values=pixels, target='a', method='saliency', baseline=None, delta=None)
    learn.model = Linear(1, 1)
    with fits.open(write_map(a, tmp_path/'map.fits', **map_origin(learn, 1))) as hdus:
        assert hdus[0].header['OBJECT'] == '1.fits'
        y, x = np.unravel_index(hdus[0].data.argmax(), (40, 40))
        there, star = WCS(hdus[0].header).pixel_to_world(x, y), wcs.pixel_to_world(10, 25)
    assert there.separation(star).arcsec < .1
    (tmp_path/'1.fits').unlink()
    assert cutout_wcs(learn, 1) is None                     # moved since: nothing is guessed
