"""FITS files as surveys send them and as they should not be: real ones, damaged ones, large ones."""
import json, pickle, signal, sys, tracemalloc, warnings
from dataclasses import replace
from pathlib import Path

import numpy as np, pandas as pd, pytest
from astropy.io import fits
from astropy.wcs import WCS
from hypothesis import given, settings, strategies as st

from astroformer_astro.core import GalaxyDataError
from astroformer_astro.data.fits import FitsImage, FitsReader, _unfilled, fits_cutout, read_fits, read_fits_catalog
from astroformer_astro.synth import synth_galaxy

real = Path(__file__).parents[2]/'shared'/'data'/'fits'
needs_real = pytest.mark.skipif(not real.is_dir(), reason=f'{real} is absent: no real FITS files to read')


def header(size=64, px=.4, ra=150., dec=2., **keys):
    h = fits.Header()
    h.update(CTYPE1='RA---TAN', CTYPE2='DEC--TAN', CRVAL1=ra, CRVAL2=dec, CRPIX1=(size + 1)/2, CRPIX2=(size + 1)/2, CD1_1=-px/3600, CD1_2=0., CD2_1=0., CD2_2=px/3600)
    h.update(keys)
    return h


@pytest.fixture(scope='module')
def sky(): return np.random.default_rng(0).normal(0, 1, (5, 64, 64)).astype('f4')


@pytest.fixture
def quiet():
    "Any warning is an error"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield


scales = {'gzbcnn': .262, 'temp_small': .262, 'NGC2893': .262, 'Plate': .396, 'cutout-HSC': .168, 'Cut_HSC': .168, 'Cut_HST': .03, 'abell': .06, 'gband': .263, 'rband': .263}
masked = {'bad_pix': .4949, '132_g': .1211, 'PGC0000218': .0475, 'Plate0270': .1016, 'Plate0276': .0117}
bands = {'decals': 'grz', 'NGC2893': 'g', 'Plate': 'r', 'cutout-HSC': 'i', 'Cut_HSC': '12345', 'gband': 'g', 'rband': 'r', '_g.': 'g', '_r.': 'r', '_i.': 'i'}


@needs_real
@pytest.mark.parametrize('path', sorted(p for p in real.rglob('*.f*') if p.is_file()), ids=lambda p: p.name)
def test_real_files_load_or_say_why_not(path, quiet, capfd):
    if 'truncated' in path.name or '_rms' in path.name:
        with pytest.raises(GalaxyDataError, match='is cut short' if 'truncated' in path.name else "is 'rms'") as e: read_fits(path)
        assert path.name in str(e.value) and '\n' not in str(e.value)
        return
    image = read_fits(path)
    assert np.isfinite(image.data).all() and image.data.dtype == np.dtype('f4') and image.data.dtype.isnative
    for part, px in scales.items():
        if part in path.name: assert image.pxscale == pytest.approx(px, rel=.005)
    for part, names in bands.items():
        if part in str(path): assert ''.join(image.bands) == names
    assert image.masked == pytest.approx(next((v for name, v in masked.items() if name in path.name), 0), abs=1e-3)
    assert capfd.readouterr() == ('', '')


@needs_real
def test_real_units():
    unit = lambda name: read_fits(next(real.rglob(name))).unit
    assert [unit(n) for n in ('NGC2893*', 'Plate0270*', '10-cutout*', 'abell*f105w.fits.gz')] == ['nanomaggies']*4
    assert [unit(n) for n in ('132_gband*', 'PGC0000212_g*', 'temp_small*')] == ['unknown']*3


@needs_real
@pytest.mark.parametrize('name', ['132', '150'])
def test_real_bands_on_different_grids_meet(name):
    "The two grids are 0.9 pixels apart; both galaxies are where the header says, and in both bands at the same place once aligned"
    files = {b: next(real.rglob(f'{name}_{b}band.fits')) for b in 'gr'}
    head = fits.getheader(files['r'])
    assert any('brought to the grid' in n for n in read_fits(files).notes)
    x, y = read_fits(files).wcs.world_to_pixel_values(head['RA'], head['DEC'])
    assert abs(x - head['RA_PIX']) < 1.01 and abs(y - head['DEC_PIX']) < 1.01
    image = fits_cutout(read_fits(files), 48, head['RA'], head['DEC'])
    g, r = (b - np.median(b) for b in image.data)
    shifts = {(dy, dx): np.corrcoef(np.roll(g, (dy, dx), (0, 1))[2:-2, 2:-2].ravel(), r[2:-2, 2:-2].ravel())[0, 1] for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
    assert max(shifts, key=shifts.get) == (0, 0)


@needs_real
def test_a_real_survey_of_three_files_each():
    names = sorted({p.name[:10] for p in real.rglob('PGC*')})
    s = read_fits_catalog(pd.DataFrame(dict(name=names, label=list('ababa'))), real/'efigi_sdss_gri', '{name}_{band}.fits', bands='gri', size=64, progress=False)
    assert s.images.shape == (5, 64, 64, 3) and s.bands == ('g', 'r', 'i') and s.picture(0).shape == (64, 64, 3)
    assert s.catalog.ra.iloc[0] == pytest.approx(.79708, abs=1e-3) and s.catalog.dec.iloc[0] == pytest.approx(15.965, abs=1e-3)


@pytest.mark.parametrize('names', ['r', 'grz', 'grizy'])
def test_any_number_of_bands(tmp_path, sky, names, quiet):
    for i in range(4): fits.writeto(tmp_path/f'{i}.fits', sky[:len(names)] + i, header(BANDS=names) if len(names) > 1 else header(FILTER=names))
    table = pd.DataFrame(dict(file=[f'{i}.fits' for i in range(4)], label=list('abab')))
    s = read_fits_catalog(table, tmp_path, size=64, progress=False)
    assert s.images.shape == (4, 64, 64, len(names)) and s.images.dtype == np.float32 and s.bands == tuple(names)
    assert np.array_equal(s.images[3][::-1], np.moveaxis(sky[:len(names)] + 3, 0, -1))
    assert s.stretch(np.moveaxis(s.images[0], -1, 0)).shape == (len(names), 64, 64)


def test_reader_travels_as_json_and_pickle(tmp_path, sky):
    fits.writeto(tmp_path/'a.fits', sky, header(BANDS='grizy', BUNIT='nanomaggy'))
    s = read_fits_catalog(pd.DataFrame(dict(file=['a.fits']*2, label=['a', 'b'])), tmp_path, size=32, pxscale=.7, invalid='channel', progress=False)
    for reader in (pickle.loads(pickle.dumps(s.reader)), FitsReader.from_dict(json.loads(json.dumps(s.reader.to_dict())))):
        assert replace(reader, folder=s.reader.folder) == s.reader and np.array_equal(reader(tmp_path/'a.fits'), s.images[0])
    assert 'folder' not in s.reader.to_dict() and np.array_equal(s.reader(s.catalog.iloc[1]), s.images[1])


def test_new_files_must_be_in_the_unit_of_training(tmp_path, sky):
    fits.writeto(tmp_path/'a.fits', sky[0], header(FILTER='g', BUNIT='nanomaggy'))
    fits.writeto(tmp_path/'b.fits', sky[0], header(FILTER='g', BUNIT='nJy'))
    fits.writeto(tmp_path/'c.fits', sky[0], header(FILTER='g', BUNIT='adu'))
    reader = FitsReader(64, 'g', unit='nanomaggies')
    assert np.allclose(reader(tmp_path/'a.fits'), reader(tmp_path/'b.fits')*3631, rtol=1e-5)
    with pytest.raises(GalaxyDataError, match="c.fits is in 'counts' where 'nanomaggies' is wanted"): reader(tmp_path/'c.fits')


@pytest.mark.parametrize('kind', ['plain', 'scaled', 'packed'])
def test_a_cut_out_of_a_large_frame_does_not_read_the_frame(tmp_path, kind):
    frame = np.random.default_rng(1).normal(0, 1, (2500, 2500)).astype('f4')
    hdu = fits.CompImageHDU(frame, header(2500, FILTER='r')) if kind == 'packed' else fits.ImageHDU(frame.copy(), header(2500, FILTER='r'))
    if kind == 'scaled': hdu.scale('int16', bscale=1e-3, bzero=0)
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(tmp_path/'frame.fits')
    reader = FitsReader(64)
    reader(tmp_path/'frame.fits', 150., 2.)
    tracemalloc.start()
    x = reader(tmp_path/'frame.fits', 150., 2. + 100*.4/3600)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6 < frame.nbytes and np.allclose(x[::-1, :, 0], frame[1318:1382, 1218:1282], atol=.1 if kind == 'packed' else 1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(8, 80), st.floats(.1, 2), st.floats(-10, 10), st.floats(-10, 10))
def test_flux_is_kept_and_the_position_in_the_middle(size, step, dx, dy):
    "A star anywhere, cut out at any scale: all of its flux, in the middle"
    if size*step < 14: return
    y, x = np.mgrid[:64, :64]
    star = np.exp(-((x - 31.5 - dx)**2 + (y - 31.5 - dy)**2)/2/1.3**2).astype('f4')[None]
    image = FitsImage(star, np.zeros(star.shape, bool), ('g',), WCS(header()), .4, 'nanomaggies')
    where = image.wcs.pixel_to_world_values(31.5 + dx, 31.5 + dy)
    cut = fits_cutout(image, size, *map(float, where), pxscale=.4*step)
    flux = np.where(cut.mask, 0, cut.data)[0]
    if size*step + 2*max(abs(dx), abs(dy)) < 62: assert not cut.mask.any()
    assert flux.sum() == pytest.approx(star.sum(), rel=1e-3)
    middle = [(flux*g).sum()/flux.sum() - (size - 1)/2 for g in np.mgrid[:size, :size]]
    assert np.abs(middle).max() < (.51 if abs(size*step - size) < .1 else .05)
    x, y = cut.wcs.world_to_pixel_values(*where)
    assert np.hypot(x - middle[1] - (size - 1)/2, y - middle[0] - (size - 1)/2) < .05


def test_reproject_is_asked_for_only_where_it_is_needed(tmp_path, sky, monkeypatch):
    for b, shift in (('g', 0), ('r', .05), ('z', 3)): fits.writeto(tmp_path/f'{b}.fits', sky[0], header(FILTER=b, CRPIX1=32.5 + shift))
    monkeypatch.setitem(sys.modules, 'reproject', None)
    assert read_fits([tmp_path/'g.fits', tmp_path/'r.fits']).bands == ('g', 'r')
    with pytest.raises(ImportError, match=r"astroformer_astro\[fits\]"): read_fits([tmp_path/'g.fits', tmp_path/'z.fits'])


def test_swapped_columns_are_noticed(tmp_path, sky):
    for b, plane in zip('gr', sky): fits.writeto(tmp_path/f'gal_{b}.fits', plane, header())
    assert read_fits({b: tmp_path/f'gal_{b}.fits' for b in 'gr'}).bands == ('g', 'r')
    with pytest.raises(GalaxyDataError, match='was given for band g, but holds r'): read_fits({'g': tmp_path/'gal_r.fits', 'r': tmp_path/'gal_g.fits'})


def test_hcompress_needs_its_check_sum(tmp_path, sky):
    "Damaged tiles of that kind crash Python inside of astropy"
    hdus = fits.HDUList([fits.PrimaryHDU(), fits.CompImageHDU((100*sky[0]).astype('i4'), header(FILTER='g'), compression_type='HCOMPRESS_1')])
    hdus.writeto(tmp_path/'with.fits', checksum=True)
    hdus.writeto(tmp_path/'without.fits')
    assert read_fits(tmp_path/'with.fits').data.std() > 90
    with pytest.raises(GalaxyDataError, match='without.fits is compressed by HCOMPRESS_1 and has no valid check sums'): read_fits(tmp_path/'without.fits', checksum=False)


def written(hdus, path, **kwargs):
    hdus.writeto(path, overwrite=True, **kwargs)
    return path.read_bytes()


@pytest.fixture(scope='module')
def good(tmp_path_factory, sky):
    folder, p = tmp_path_factory.mktemp('good'), fits.PrimaryHDU()
    masked = fits.HDUList([p, fits.ImageHDU(sky[0], header(FILTER='g'), name='IMAGE'), fits.ImageHDU((sky[1] > 3).astype('i4'), name='MASK'), fits.ImageHDU(sky[2]**2, name='VARIANCE')])
    kinds = dict(cube=fits.HDUList([fits.PrimaryHDU(sky[:3], header(BANDS='grz', BUNIT='nanomaggy'))]), parts=masked,
                 rice=fits.HDUList([p, fits.CompImageHDU(sky[0], header(FILTER='g'))]), tpv=fits.HDUList([fits.PrimaryHDU(sky[0], header(FILTER='g', CTYPE1='RA---TPV', CTYPE2='DEC--TPV', PV1_1=1.01))]))
    files = {k: written(h, folder/f'{k}.fits') for k, h in kinds.items()}
    return files | dict(summed=written(kinds['cube'], folder/'summed.fits', checksum=True), packed=written(kinds['cube'], folder/'packed.fits.gz'))


def damaged(raw, rng):
    "A file cut short, with bits flipped, a header byte or a value replaced, keywords or values of two cards swapped, a card lost, or rubbish in it"
    raw, cards = bytearray(raw), [i for i in range(0, len(raw) - 80, 80) if raw[i+8:i+10] == b'= '] or [0]
    a, b = rng.choice(cards, 2)
    i, kind = rng.integers(len(raw)), rng.integers(8)
    if kind == 0: return bytes(raw[:i])
    if kind == 1: raw[i] ^= 1 << rng.integers(8)
    if kind == 2: raw[a + rng.integers(80)] = rng.integers(32, 127)
    if kind == 3: raw[a:a+8], raw[b:b+8] = raw[b:b+8], raw[a:a+8]
    if kind == 4: raw[a+10:a+80], raw[b+10:b+80] = raw[b+10:b+80], raw[a+10:a+80]
    if kind == 5: raw[a+10:a+80] = str(rng.choice(['-1', '0', '99999999999', '1e308', 'nan', "'a'", 'T', '-64', '16', '2147483648'])).rjust(20).ljust(70).encode()
    if kind == 6: del raw[a:a+80]
    if kind == 7: raw[i:i+2000] = rng.bytes(min(2000, len(raw) - i))
    return bytes(raw)


@pytest.mark.parametrize('seed', range(6))
def test_damaged_files_are_read_right_or_refused_in_a_sentence(tmp_path, good, seed, quiet, capfd):
    rng = np.random.default_rng(seed)
    names = list(good)
    before = signal.signal(signal.SIGALRM, lambda *a: pytest.fail('hangs'))
    for i in range(60):
        name = names[i % len(names)]
        path = tmp_path/f'{i}_{name}.fits'
        path.write_bytes(damaged(good[name], rng))
        signal.alarm(20)
        try: x = FitsReader(32)(path) if i % 2 else FitsReader(16, pxscale=.8)(path, 150., 2.)
        except GalaxyDataError as e: assert path.name in str(e) and '\n' not in str(e)
        else: assert np.isfinite(x).all() and x.shape[:2] == ((32, 32) if i % 2 else (16, 16))
        signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert capfd.readouterr() == ('', '')


def test_a_flipped_bit_under_a_check_sum_is_never_read(tmp_path, good):
    rng, raw = np.random.default_rng(0), good['summed']
    for i in 2880 + rng.integers(3*64*64*4, size=40):
        path = tmp_path/f'{i}.fits'
        path.write_bytes(raw[:i] + bytes([raw[i] ^ 16]) + raw[i+1:])
        with pytest.raises(GalaxyDataError, match='disagrees with its own check sum'): read_fits(path)
        assert np.isfinite(read_fits(path, checksum=False).data).all()


@pytest.fixture
def mixed(tmp_path, sky):
    "Ten files in four kinds, the first of which is not what most are: two in counts, five in nanomaggies, one of them in nJy, two of five bands, one without a unit; all of the same galaxy but for the unit"
    kinds = ['ADU']*2 + ['nanomaggy']*4 + ['nJy'] + ['five']*2 + ['']
    for i, k in enumerate(kinds):
        data = sky if k == 'five' else sky[:3]*(3631 if k == 'nJy' else 1)
        fits.writeto(tmp_path/f'{i}.fits', data, header(BANDS='grizy' if k == 'five' else 'gri', **dict(BUNIT='nanomaggy' if k == 'five' else k) if k else {}))
    return tmp_path, pd.DataFrame(dict(file=[f'{i}.fits' for i in range(10)], label=list('ab')*5))


def test_files_of_several_kinds_are_tallied(mixed):
    folder, table = mixed
    with pytest.raises(GalaxyDataError) as e: read_fits_catalog(table, folder, progress=False)
    for words in ('mixes files of 4 kinds: 5 in nanomaggies with bands g r i (row 2: 2.fits), 2 in counts with bands g r i (row 0: 0.fits), 2 in nanomaggies with bands g r i z y (row 7: 7.fits), '
                  '1 without a unit with bands g r i (row 9: 9.fits)', 'zeropoint=', "bands='g r i'", 'bad=skip'): assert words in str(e.value), words
    assert '\n' not in str(e.value)
    (folder/'4.fits').write_bytes(b'')
    with pytest.raises(GalaxyDataError, match=r'4 in nanomaggies with bands g r i .*; and 1 cannot be read \(row 4: .*4.fits is not a FITS file'): read_fits_catalog(table, folder, progress=False)


def test_what_most_files_are_is_the_standard(mixed, sky):
    folder, table = mixed
    s = read_fits_catalog(table, folder, size=64, bad='skip', progress=False)
    assert s.catalog.file.tolist() == [f'{i}.fits' for i in range(2, 7)] and s.skipped.row.tolist() == [0, 1, 7, 8, 9]
    assert (s.reader.unit, s.reader.bands) == ('nanomaggies', ('g', 'r', 'i'))
    for image in s.images: assert np.allclose(image[::-1], np.moveaxis(sky[:3], 0, -1), rtol=1e-5)
    assert s.skipped.problem[0] == '0.fits is in counts with bands g r i, unlike 5 of the 10 that can be read, in nanomaggies with bands g r i'
    assert '9.fits is without a unit' in s.skipped.problem[4] and np.allclose(s.catalog.pxscale, .4)


def test_a_file_that_vanishes_before_the_second_look_is_listed(mixed, monkeypatch):
    folder, table = mixed
    cutout, seen = FitsReader.cutout, []
    def once(self, path, *where):
        seen.append(path)
        if path.name == '3.fits' and seen.count(path) == 2: path.unlink()
        return cutout(self, path, *where)
    monkeypatch.setattr(FitsReader, 'cutout', once)
    s = read_fits_catalog(table, folder, size=64, bad='skip', progress=False)
    assert s.skipped.row.tolist() == [0, 1, 3, 7, 8, 9] and s.skipped.problem[2].endswith('3.fits does not exist') and np.isfinite(s.images).all()


def test_the_way_out_that_the_tally_names_is_one(mixed, sky):
    folder, table = mixed
    s = read_fits_catalog(table, folder, size=64, bands='g r i', zeropoint=22.5, progress=False)
    assert len(s) == 10 and not len(s.skipped)
    for image in s.images: assert np.allclose(image[::-1], np.moveaxis(sky[:3], 0, -1), rtol=1e-5)
    with pytest.raises(GalaxyDataError, match="unit='auto'"): read_fits_catalog(table[2:7], folder, unit='keep', progress=False)


def test_fluxes_come_in_the_unit_asked_for(mixed, sky):
    folder, table = mixed
    s = read_fits_catalog(table[2:7], folder, size=64, unit='uJy', progress=False)
    for image in s.images: assert np.allclose(image[::-1], np.moveaxis(sky[:3]*3.631, 0, -1), rtol=1e-5)
    assert s.reader.unit == 'uJy' and np.allclose(s.reader(folder/'2.fits'), s.images[0])
    with pytest.raises(GalaxyDataError, match="is in 'counts' where 'uJy' is wanted"): s.reader(folder/'0.fits')


def test_a_zero_point_is_for_headers_without(tmp_path, sky):
    fits.writeto(tmp_path/'a.fits', sky[0], header(FILTER='g', BUNIT='adu', MAGZERO=25.))
    fits.writeto(tmp_path/'b.fits', sky[0], header(FILTER='g', BUNIT='adu'))
    a, b = (read_fits(tmp_path/f, zeropoint=22.5).data for f in ('a.fits', 'b.fits'))
    assert np.allclose(b, sky[0]) and np.allclose(a, sky[0]/10)


@needs_real
def test_real_files_of_all_kinds_are_tallied_and_most_are_kept():
    files = [str(p.relative_to(real)) for k in ('sdss_r_single', 'decals_grz_cube', 'hsc_grizy_cube') for p in sorted((real/k).glob('*.fit*'))]
    table = pd.DataFrame(dict(file=files, label=(['a', 'b']*len(files))[:len(files)]))
    with pytest.raises(GalaxyDataError, match='5 without a unit with bands g r z .*3 in nanomaggies with bands r '): read_fits_catalog(table, real, progress=False)
    s = read_fits_catalog(table, real, bad='skip', progress=False)
    assert s.bands == ('g', 'r', 'z') and len(s) == 5 and len(s) + len(s.skipped) == len(files)


def _planes_of_bands(path, named, hole=(1,)):
    "An image and a weight for each band, of which that of some bands is zero in one half"
    hdus = [fits.PrimaryHDU()]
    for i, band in enumerate('grz'):
        pixels, weight = np.random.default_rng(i).normal(5, 1, (32, 32)).astype('f4'), np.ones((32, 32), 'f4')
        if i in hole: weight[:, 16:] = 0
        for kind, plane in ('image', pixels), ('invvar', weight):
            h = fits.ImageHDU(plane)
            h.header['IMAGETYP'] = kind
            if named or kind == 'image': h.header['BAND'] = band
            hdus.append(h)
    fits.HDUList(hdus).writeto(path)
    return path


@pytest.mark.parametrize('named', [True, False])
def test_the_weight_of_a_band_is_for_that_band(tmp_path, named):
    image = read_fits(_planes_of_bands(tmp_path/'a.fits', named))
    assert image.bands == ('g', 'r', 'z')
    assert [m.mean() for m in image.mask] == [0, .5, 0]
    assert image.data[0, :, 16:].std() > .5 and image.data[2, :, 16:].std() > .5


@pytest.mark.parametrize('says', [dict(ORIGIN='2MASS', MAGZP=20.8), dict(TELESCOP='WISE', MAGZP=20.5, BUNIT='DN'), dict(MAGSYS='Vega', MAGZERO=25.)])
def test_a_zero_point_of_vega_is_not_taken_for_one_of_ab(tmp_path, sky, says):
    fits.writeto(path := tmp_path/'k.fits', sky[0], header(FILTER='Ks', **says))
    image = read_fits(path)
    assert image.unit != 'nanomaggies' and np.array_equal(image.data[0], sky[0]) and 'Vega' in image.summary()
    assert read_fits(path, zeropoint=22.5).unit == 'nanomaggies'


def test_pixels_on_an_asinh_scale_are_no_flux(tmp_path, sky):
    fits.writeto(path := tmp_path/'ps1.fits', sky[0], header(FILTER='r', BSOFTEN=300., BOFFSET=.5))
    with pytest.raises(GalaxyDataError, match='asinh scale'): read_fits(path)


@pytest.mark.parametrize('value, kind, said', [(0, 'i2', '100% exactly zero'), (7, 'i2', 'is blank'), (7, 'f4', 'is blank')])
def test_a_blank_image_is_refused_as_a_blank_picture_is(tmp_path, value, kind, said):
    fits.writeto(path := tmp_path/'blank.fits', np.full((2, 64, 64), value, kind), header())
    with pytest.raises(GalaxyDataError, match=said): read_fits(path)


@pytest.mark.parametrize('mask, weight', [('MSK', 'WGT'), ('DQ', 'AREA')])
def test_masks_by_the_names_of_des_and_jwst(tmp_path, sky, mask, weight):
    bad = np.zeros((64, 64), 'i2')
    bad[:8] = 1
    planes = [fits.ImageHDU(sky[0], header(FILTER='r'), 'SCI'), fits.ImageHDU(bad, name=mask), fits.ImageHDU(np.ones((64, 64), 'f4'), name=weight)]
    fits.HDUList([fits.PrimaryHDU(), *planes]).writeto(path := tmp_path/'a.fits')
    assert read_fits(path).masked == read_fits(path, ext='SCI').masked == 1/8


def test_a_pattern_that_cannot_be_filled_in_is_one_sentence(tmp_path, sky):
    for i in range(4): fits.writeto(tmp_path/f'{i}_r.fits', sky[0] + i, header(ra=150 + i, FILTER='r', BUNIT='nanomaggy'))
    table = pd.DataFrame(dict(id=[0, 1, 2, 3, np.nan], name='a', label=list('ababa')))
    for x in ('{}_{band}.fits', '{name:03d}_{band}.fits'):
        with pytest.raises(GalaxyDataError, match='cannot be filled in'): read_fits_catalog(table, tmp_path, x=x, bands='r', size=32, progress=False)
    g = read_fits_catalog(table, tmp_path, x='{id}_{band}.fits', bands='r', size=32, bad='skip', progress=False)
    assert len(g) == 4 and g.skipped.problem.tolist() == ['no file is named']


def test_a_wheel_with_an_empty_slot_does_not_name_the_planes_of_a_cube(tmp_path, sky):
    fits.writeto(path := tmp_path/'a.fits', sky[:2], header(FILTER1='CLEAR1L', FILTER2='F814W'))
    assert read_fits(path).bands == ('1', '2') and read_fits(path, ['F606W', 'F814W']).bands == ('F606W', 'F814W')


@pytest.mark.parametrize('middle', [3., np.nan, 0.])
def test_a_band_without_a_signal_is_refused_by_name(tmp_path, sky, middle):
    cube = np.stack([sky[0], np.full((64, 64), middle, 'f4'), sky[1]])
    fits.writeto(path := tmp_path/'gal.fits', cube, header(BANDS='grz'))
    assert read_fits(path).mask.mean((1, 2)).tolist() == [0, 1, 0] and 'nothing was measured in r' in read_fits(path).summary()
    for invalid in ('fill', 'channel', 'refuse'):
        with pytest.raises(GalaxyDataError, match='gal.fits: 100.0% of band r .*max_masked'): FitsReader(64, invalid=invalid)(path)
    assert FitsReader(64, 'gz')(path).shape == (64, 64, 2)
    assert (FitsReader(64, max_masked=1)(path)[..., 1] == 0).all()


def test_the_share_that_was_not_measured_is_limited_in_each_band(tmp_path, sky):
    cube = sky[:3].copy()
    cube[1, :52] = np.nan
    fits.writeto(path := tmp_path/'gal.fits', cube, header(BANDS='grz'))
    with pytest.raises(GalaxyDataError, match='81.2% of band r .*at most 75%'): FitsReader(64)(path)
    assert FitsReader(64, max_masked=.9)(path).shape == (64, 64, 3)


@pytest.mark.parametrize('kind', ['i2', 'i4', 'u2', 'f4'])
@pytest.mark.parametrize('width', [6, 32])
def test_borders_of_zeros_are_masked_in_whole_numbers_too(tmp_path, kind, width):
    counts = np.random.default_rng(0).poisson(3, (64, 64)).astype(kind)
    counts[:, :width] = 0
    fits.writeto(path := tmp_path/'gal.fits', counts, header())
    assert read_fits(path).masked == pytest.approx(width/64, abs=.005)


@settings(max_examples=40, deadline=None)
@given(st.floats(.02, 5), st.integers(0, 999))
def test_few_counts_are_measurements(rate, seed):
    counts = np.random.default_rng(seed).poisson(rate, (64, 64)).astype('f4')
    assert _unfilled(counts, False).mean() < .005
