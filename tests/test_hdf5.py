"""HDF5 files under stress: killed half-way, read by workers, damaged, larger than memory should be, in folders that refuse them."""
import os, pickle, shutil, signal, subprocess, sys, tempfile, textwrap, time
from pathlib import Path

import h5py, numpy as np, pandas as pd, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from astroformer_astro.core import GalaxyDataError
from astroformer_astro.data.hdf5 import MappedPixels, check_layout, file_fingerprint, pack, read_hdf5, repack
from astroformer_astro.data.images import GalaxySet
from astroformer_astro.data.stretch import Stretch

shared = Path(__file__).parents[2]/'shared'/'data'
rng = np.random.default_rng(0)


def survey(n=12, px=8):
    table = dict(ra=rng.uniform(0, 9, n), name=(['a', 'bé', None]*n)[:n], label=(list('abc')*n)[:n], redshift=rng.uniform(0, 1, n), k=np.arange(n))
    return GalaxySet(rng.integers(0, 255, (n, px, px, 3), np.uint8), pd.DataFrame(table), ('c', 'a', 'b'), 'a test')


def same(a, b):
    return np.array_equal(np.asarray(a.images), np.asarray(b.images)) and a.catalog.equals(b.catalog) and a.classes == b.classes


def hostile(path, n=60, px=32, **kwargs):
    "A file in chunks of many images"
    kwargs = dict(chunks=(min(n, 555), px//4, px//4, 1)) | kwargs
    with h5py.File(path, 'w') as f:
        d = f.create_dataset('images', (n, px, px, 3), np.uint8, **kwargs)
        for i in range(0, n, 555): d[i:i+555] = rng.integers(0, 9, (min(555, n - i), px, px, 3), np.uint8)
        f['ans'], f['ra'] = np.sort(np.arange(n) % 10), np.arange(n)/n
    return path


def python(code, *args, **kwargs):
    "A process that runs `code` on the package"
    return subprocess.Popen([sys.executable, '-c', textwrap.dedent(code), *map(str, args)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent, **kwargs)


# Each command, made to say so and to wait when a third of the galaxies is written
slow = '''
    import sys, time
    import astroformer_astro.data.hdf5 as h
    put = h._put_pixels
    def slowly(f, blocks, *args):
        def pieces():
            for b in blocks:
                yield b[:len(b)//3]
                f.flush(); print('half', flush=True); time.sleep(60)
                yield b[len(b)//3:]
        put(f, pieces(), *args)
    h._put_pixels = slowly
    {command}
'''
commands = dict(repack='h.repack(sys.argv[1], size=24, out=sys.argv[2], progress=False)',
                pack='h.pack(h.read_hdf5(sys.argv[1], size=32, progress=False), sys.argv[2], progress=False)',
                pack_catalog='h.pack(sys.argv[1], sys.argv[2], size=30, progress=False)')


@pytest.mark.parametrize('name', commands)
def test_killed_half_way_and_run_again(name, tmp_path):
    source = hostile(tmp_path/'s.h5', n=200)
    if name == 'pack_catalog':
        source = tmp_path/'t.csv'
        for k in range(100): Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(tmp_path/f'{k}.png')
        pd.DataFrame(dict(file=[f'{k}.png' for k in range(100)], label=['a', 'b']*50, z=.5)).to_csv(source, index=False)
    out, undisturbed = tmp_path/'out'/'o.h5', tmp_path/'other'/'o.h5'
    with python(slow.format(command=commands[name]), source, out) as p:
        while (line := p.stdout.readline()) != 'half\n': assert line, 'ended before it was killed'
        p.send_signal(signal.SIGKILL)
    left, = out.parent.iterdir()
    assert left.name.endswith('.tmp') and left.stat().st_size > 10_000
    import astroformer_astro.data.hdf5 as h
    for target in out, undisturbed:
        exec(commands[name], dict(h=h, sys=type('', (), dict(argv=['', str(source), str(target)]))))
        if name == 'pack': time.sleep(1.1)         # HDF5's time stamps are of a second, and must not be there
    assert [f.name for f in out.parent.iterdir()] == ['o.h5']
    assert out.read_bytes() == undisturbed.read_bytes()


class Rows(torch.utils.data.Dataset):
    def __init__(self, images): self.images = images
    def __len__(self): return len(self.images)
    def __getitem__(self, i): return torch.from_numpy(self.images[i].copy())


@pytest.mark.parametrize('start', ['fork', 'spawn'])
def test_workers_read_lazily(start, tmp_path):
    g = read_hdf5(hostile(tmp_path/'s.h5'), size=32, progress=False, in_memory=0)
    assert type(g.images) is MappedPixels and len(pickle.dumps(g.images)) < 1000
    dl = torch.utils.data.DataLoader(Rows(g.images), batch_size=7, num_workers=2 if start == 'fork' else 1, multiprocessing_context=start)
    with h5py.File(tmp_path/'s.h5') as f: assert np.array_equal(torch.cat(list(dl)), f['images'][:])


@pytest.mark.parametrize('start', ['fork', 'spawn'])
def test_some_rows_of_a_mapped_file_stay_in_it(start, tmp_path):
    g = read_hdf5(hostile(tmp_path/'s.h5'), size=32, progress=False, in_memory=0)
    some = g.take(np.arange(60) != 7).take(range(3, 50))
    assert len(some) == 47 and len(pickle.dumps(some.images)) < 2000
    rows = np.delete(np.arange(60), 7)[3:50]
    dl = torch.utils.data.DataLoader(Rows(some.images), batch_size=7, num_workers=1, multiprocessing_context=start)
    with h5py.File(tmp_path/'s.h5') as f: assert np.array_equal(torch.cat(list(dl)), f['images'][:][rows])
    back = read_hdf5(pack(some, tmp_path/'o.h5', progress=False), size=32, progress=False)
    assert same(back, some)


@pytest.mark.skipif(sys.platform != 'linux', reason='peak memory is read from /proc')
def test_one_unusable_row_does_not_bring_the_others_into_memory(tmp_path):
    for k in range(3): Image.fromarray(rng.integers(0, 255, (512, 512, 3), np.uint8)).save(tmp_path/f'{k}.png', compress_level=1)
    pd.DataFrame(dict(file=[f'{k % 3}.png' for k in range(400)] + ['none.png'], label='a')).to_csv(tmp_path/'t.csv', index=False)
    with python('''
        import re, sys
        from functools import partial
        import astroformer_astro.data.images as images
        images.pixel_store = partial(images.pixel_store, in_memory=0)
        own = lambda: int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1])//1024      # without the pages of files
        before = own()
        g = images.read_catalog(sys.argv[1], size=512, bad='skip', progress=False)
        print(len(g), own() - before)''', tmp_path/'t.csv') as p: said = p.stdout.read().split()
    assert said[0] == '400' and int(said[1]) < 100, said


def test_a_pickle_of_another_file_is_refused(tmp_path):
    g = read_hdf5(pack(survey(), tmp_path/'s.h5', progress=False), size=8, progress=False)
    kept = pickle.dumps(g.images)
    pack(survey(), tmp_path/'s.h5', progress=False)
    assert np.array_equal(g.images[3], np.asarray(g.images)[3])          # who has it open keeps the old one
    with pytest.raises(GalaxyDataError, match='has changed since'): pickle.loads(kept)[0]
    (tmp_path/'s.h5').unlink()
    with pytest.raises(GalaxyDataError, match='cannot be read'): pickle.loads(kept)[0]


@pytest.mark.skipif(sys.platform != 'linux', reason='peak memory is read from /proc')
def test_memory_does_not_grow_with_the_file(tmp_path):
    "315 MB are repacked in pieces, at full and at a smaller size; imports are not counted"
    source = hostile(tmp_path/'s.h5', n=1600, px=256, chunks=(555, 128, 128, 3))
    with python('''
        import re, sys
        from astroformer_astro.data.hdf5 import *
        now = lambda what: int(re.search(what + r':\\s+(\\d+)', open('/proc/self/status').read())[1])//1024
        open('/proc/self/clear_refs', 'w').write('5')           # the peak of the imports is forgotten
        before = now('VmRSS')
        for size in (None, 32): repack(sys.argv[1], size=size, progress=False)
        print(now('VmHWM') - before)''', source) as p: said = p.stdout.read().split()
    assert int(said[-1]) < 200, said


def test_an_edited_source_is_repacked_again(tmp_path):
    source = hostile(tmp_path/'s.h5')
    read = lambda: read_hdf5(source, size=32, progress=False, in_memory=0)
    first, before = read(), os.stat(source)
    with h5py.File(source, 'a') as f: f['ans'][0], f['images'][5] = 7, 1
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))           # an editor that restores the time
    again = read()
    assert first.catalog.label[0] != again.catalog.label[0] and (again.images[5] == 1).all() and not (first.images[5] == 1).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['s.h5', 's.h5.32px.repacked.h5']


@pytest.mark.parametrize('hurt', [lambda b: b[:len(b)//2], lambda b: b'', lambda b: b'x'*len(b)])
def test_a_damaged_copy_is_made_again(hurt, tmp_path):
    copy = repack(hostile(tmp_path/'s.h5'), progress=False)
    whole = copy.read_bytes()
    copy.write_bytes(hurt(whole))
    assert repack(tmp_path/'s.h5', progress=False).read_bytes() == whole


@pytest.fixture
def base():
    "A folder that others may look into, as pytest's own may not"
    folder = Path(tempfile.mkdtemp(dir='/tmp'))
    folder.chmod(0o755)
    yield folder
    for f in folder.iterdir(): f.chmod(0o755)
    shutil.rmtree(folder)


@pytest.fixture
def nobody():
    "A user without special rights, whom folders can refuse"
    if os.geteuid() == 0: os.seteuid(65534)
    yield
    os.seteuid(os.getuid())


def test_read_only_folder(base, monkeypatch, capsys, request):
    for name in 'survey', 'cache', 'closed': (base/name).mkdir()
    hostile(base/'survey'/'s.h5')
    for name, mode in (('survey', 0o555), ('cache', 0o777), ('closed', 0o555)): (base/name).chmod(mode)
    request.getfixturevalue('nobody')
    monkeypatch.setenv('XDG_CACHE_HOME', str(base/'cache'))
    first = read_hdf5(base/'survey'/'s.h5', size=32, progress=False, in_memory=0)
    assert str(base/'cache') in (said := capsys.readouterr().out) and 'is closed or full' in said
    assert same(first, read_hdf5(base/'survey'/'s.h5', size=32, progress=False, in_memory=0)) and not capsys.readouterr().out
    monkeypatch.setenv('XDG_CACHE_HOME', str(base/'closed'))
    with pytest.raises(GalaxyDataError, match='say where it may be'): repack(base/'survey'/'s.h5', progress=False)
    assert repack(base/'survey'/'s.h5', out=base/'cache'/'mine.h5', progress=False) == base/'cache'/'mine.h5'


def test_a_full_disk_is_one_sentence(tmp_path):
    pack(survey(400, 32), tmp_path/'s.h5', progress=False)
    with python('''
        import sys, resource
        from astroformer_astro.core import GalaxyDataError
        from astroformer_astro.data.hdf5 import *
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, resource.RLIM_INFINITY))
        for write in (lambda: repack(sys.argv[1], size=31, progress=False), lambda: pack(read_hdf5(sys.argv[1], size=32, progress=False), sys.argv[2], progress=False)):
            try: write()
            except GalaxyDataError as e: print(e)''', tmp_path/'s.h5', tmp_path/'o.h5') as p: said = p.stdout.read()
    assert said.count('cannot be written (File too large)') == 2
    assert [f.name for f in tmp_path.iterdir()] == ['s.h5']


@pytest.mark.skipif(not shared.exists(), reason='the real galaxies are not here')
def test_real_hostile_file(tmp_path):
    source = shared/'galaxy10_layout.h5'
    copy = repack(source, out=tmp_path/'c.h5', progress=False)
    with h5py.File(source) as f, h5py.File(copy) as c:
        layout = check_layout(f)
        assert layout.hostile and layout.touched == 768 and not check_layout(c).hostile and 'missing: redshift 7' in str(layout) and 'sorted by class' in str(layout)
        assert set(f) | {'images_crc32'} == set(c)
        for k in f: assert np.array_equal(f[k][:], c[k][:], equal_nan=f[k].dtype.kind == 'f') and f[k].dtype == c[k].dtype
    assert same(read_hdf5(copy, size=256, progress=False), read_hdf5(source, size=256, progress=False))
    assert repack(source, out=copy) == copy


names = st.text(st.characters(codec='utf-8', exclude_characters='\0'), max_size=8)
columns = dict(float=st.floats(width=32), int=st.integers(-2**63, 2**63 - 1), bool=st.booleans(), text=st.none() | names)


@st.composite
def surveys(draw):
    n, px, bands = draw(st.integers(1, 7)), draw(st.integers(1, 6)), draw(st.integers(0, 6))
    classes = tuple(draw(st.lists(names, min_size=1, max_size=4, unique=True)))
    each = lambda values: draw(st.lists(values, min_size=n, max_size=n))
    table = {k: each(columns[draw(st.sampled_from(sorted(columns)))]) for k in draw(st.lists(names.filter(lambda s: s not in ('label', 'redshift', 'pxscale')), unique=True, max_size=4))}
    items = draw(st.permutations([*table.items(), ('label', each(st.sampled_from(classes)))]))
    r = np.random.default_rng(draw(st.integers(0, 99)))
    images = r.normal(size=(n, px, px, bands)).astype(np.float32) if bands else r.integers(0, 255, (n, px, px, 3), np.uint8)
    return GalaxySet(images, pd.DataFrame(dict(items)), classes, bands=tuple(f'b{k}' for k in range(bands)), stretch=Stretch('log') if bands else None)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(g=surveys())
def test_what_is_packed_comes_back(g, tmp_path):
    back = read_hdf5(pack(g, tmp_path/'s.h5', progress=False), size=None, progress=False)
    assert np.array_equal(np.asarray(back.images), g.images) and back.images.dtype == g.images.dtype
    assert (back.classes, back.bands, back.stretch) == (g.classes, g.bands, g.stretch)
    pd.testing.assert_frame_equal(back.catalog, g.catalog)
    once = (tmp_path/'s.h5').read_bytes()
    assert pack(back, tmp_path/'s.h5', progress=False).read_bytes() == once


def test_types_of_columns(tmp_path):
    g = survey(3)
    odd = dict(f=np.array([1, np.nan, 3], np.float32), u=np.array([1, 2, 2**64 - 1], np.uint64), b=[True, False, True], big=np.arange(3, dtype='>i2'),
               i=pd.array([1, 2, 2**62], 'Int64'), gap=pd.array([1, None, 3], 'Int64'), c=pd.Categorical(['x', None, 'x']), n=pd.Categorical([3, 4, 3]))
    back = read_hdf5(pack(GalaxySet(g.images, g.catalog.assign(**odd), g.classes), tmp_path/'s.h5', progress=False), size=8, progress=False).catalog
    assert [back[k].dtype.name for k in 'fub'] == ['float32', 'uint64', 'bool'] and back.i.tolist() == [1, 2, 2**62] and back.big.tolist() == [0, 1, 2] and back.n.tolist() == [3, 4, 3]
    assert back.u.tolist() == [1, 2, 2**64 - 1] and back.gap.isna().tolist() == back.c.isna().tolist() == back.f.isna().tolist() == [False, True, False] and back.c[2] == 'x'


def test_whatever_else_is_in_a_file_travels_along(tmp_path):
    with h5py.File(hostile(tmp_path/'s.h5'), 'a') as f:
        f.attrs['classes'], f.attrs['note'], f.attrs['seed'] = [f'c{k}' for k in range(10)], 'real sky', 3
        f['mass'] = np.arange(60, dtype='>f4')
        f['mass'].attrs['unit'] = 'Msun'
        f['name'], f['psf'], f['log/steps'] = ['ü', 'b']*30, np.ones((5, 5)), [1, 2]
    one, two = (read_hdf5(tmp_path/'s.h5', size=32, progress=False, in_memory=m) for m in (2**28, 0))
    assert same(one, two) and one.classes[3] == 'c3' and one.catalog['name'][2] == 'ü' and type(two.images) is MappedPixels
    with h5py.File(tmp_path/'s.h5.32px.repacked.h5') as f:
        assert f.attrs['note'] == b'real sky' and f.attrs['seed'] == 3 and f['mass'].attrs['unit'] in (b'Msun', 'Msun')
        assert f['psf'][:].sum() == 25 and f['log/steps'][1] == 2 and check_layout(f).others == ('log', 'psf')


@pytest.mark.parametrize('kind', ['cut', 'byte', 'bytes'])
def test_a_damaged_file_is_refused_or_read_rightly(kind, tmp_path):
    g = survey()
    good = read_hdf5(pack(g, tmp_path/'s.h5', progress=False), size=8, progress=False)
    whole, refused = (tmp_path/'s.h5').read_bytes(), 0
    for _ in range(120):
        b = bytearray(whole)
        if kind == 'cut': del b[rng.integers(len(b)):]
        for _ in range(dict(cut=0, byte=1, bytes=9)[kind]): b[rng.integers(len(b))] ^= rng.integers(1, 256)
        (tmp_path/'d.h5').write_bytes(b)
        try: assert same(read_hdf5(tmp_path/'d.h5', size=8, progress=False), good)
        except GalaxyDataError as e: refused += 1; assert '\n' not in str(e) and 'd.h5' in str(e)
    assert refused > 60


@pytest.mark.parametrize('change, words', [
    (lambda f: (f.move('ra', 'x'), f.move('redshift', 'ra'), f.move('x', 'redshift')), "'ra' of"),
    (lambda f: (f.move('k', 'x'), f.move('ans', 'k'), f.move('x', 'ans')), "'ans' of"),
    (lambda f: f['ans'].__setitem__(3, 0), "'ans' of"),
    (lambda f: f['images'].__setitem__((3, 1, 1, 1), f['images'][3, 1, 1, 1] ^ 1), 'image 3 of'),
    (lambda f: f.__delitem__('name'), 'cannot be read'),
    (lambda f: f.attrs.__setitem__('columns', 'ra'), 'cannot be read'),
    (lambda f: f.attrs.__setitem__('classes', ['a', 'a']), 'every name once'),
    (lambda f: f.attrs.__setitem__('classes', ['a', 'b']), 'outside the 2 classes')])
def test_contents_that_were_changed(change, words, tmp_path):
    with h5py.File(pack(survey(), tmp_path/'s.h5', progress=False), 'a') as f: change(f)
    with pytest.raises(GalaxyDataError, match=words): read_hdf5(tmp_path/'s.h5', size=8, progress=False)


def test_what_cannot_be_packed(tmp_path):
    g, n = survey(), 12
    for column, words in (([[1]]*n, 'numbers and text'), (['a\0']*n, 'odd character'), (pd.Series(['\ud800']*n, dtype=object), 'odd character'), ([1, 'a']*6, 'mixed-integer values')):
        with pytest.raises(GalaxyDataError, match=words): pack(GalaxySet(g.images, g.catalog.assign(x=column), g.classes), tmp_path/'s.h5', progress=False)
    with pytest.raises(GalaxyDataError, match="class 'c', which is not among a, b"): pack(GalaxySet(g.images, g.catalog, ('a', 'b')), tmp_path/'s.h5', progress=False)
    with pytest.raises(GalaxyDataError, match='expected as many rows'): pack(GalaxySet(g.images[:5], g.catalog, g.classes), tmp_path/'s.h5', progress=False)
    assert not list(tmp_path.iterdir())


def test_an_index_that_contradicts_itself(tmp_path):
    "The published file's format does not guard where its chunks are: two chunks in one place are noticed"
    with h5py.File(hostile(tmp_path/'s.h5', compression='gzip')) as f: a, b = (f['images'].id.get_chunk_info(i).byte_offset for i in (3, 4))
    whole = (tmp_path/'s.h5').read_bytes()
    place = a.to_bytes(8, 'little')
    assert whole.count(place) == 1
    (tmp_path/'s.h5').write_bytes(whole.replace(place, b.to_bytes(8, 'little')))
    with pytest.raises(GalaxyDataError, match='index is damaged'): read_hdf5(tmp_path/'s.h5', progress=False)


def test_fingerprint_samples_the_whole_file(tmp_path):
    f = tmp_path/'f'
    f.write_bytes(bytes(10**6))
    found = set()
    for k in range(0, 10**6, 99_999):
        f.write_bytes(bytes(k) + b'1' + bytes(10**6 - k - 1))
        os.utime(f, ns=(0, 0))
        found.add(file_fingerprint(f))
    assert len(found) == 11


@pytest.mark.parametrize('key', ['ra', 'dec', 'redshift', 'pxscale'])
@pytest.mark.parametrize('shape', [(12, 1), (11,), ()])
def test_a_position_of_another_shape_is_not_dropped_without_a_word(key, shape, tmp_path):
    with h5py.File(path := tmp_path/'s.h5', 'w') as f:
        f['images'], f['ans'] = np.random.default_rng(0).integers(0, 255, (12, 8, 8, 3), np.uint8), np.arange(12, dtype=np.uint8) % 10
        for k in ('ra', 'dec', 'redshift', 'pxscale'): f[k] = np.zeros(shape if k == key else 12)
    with pytest.raises(GalaxyDataError, match=f"'{key}' of .*s.h5 is float64 .*one number for each of the 12 images"): read_hdf5(path, size=8, progress=False)


@pytest.mark.parametrize('scale', [0, -1, np.inf])
def test_a_pixel_scale_that_is_none_is_refused(tmp_path, scale):
    pack(survey(), path := tmp_path/'s.h5', progress=False)
    with h5py.File(path, 'a') as f: f['pxscale'] = [.262]*4 + [scale] + [np.nan]*7
    with pytest.raises(GalaxyDataError, match="1 of the 12 rows of .*s.h5 .*row 4: pxscale is .*expected arcsec per pixel"): read_hdf5(path, 8, progress=False)
    with h5py.File(path, 'a') as f: f['pxscale'][4] = .5
    assert read_hdf5(path, 8, progress=False).catalog.pxscale.notna().sum() == 5
