"""Downloads that break, servers that fail, processes that are killed; and archives in the layout of the real ones."""
import hashlib, http.server, io, multiprocessing, pickle, shutil, sys, tarfile, threading, time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import h5py, numpy as np, pooch, pytest, requests, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torchvision import datasets

from astroformer_astro.core import GalaxyDataError, galaxy10_classes
from astroformer_astro.data import benchmarks as module
from astroformer_astro.data.benchmarks import (FlipShift, benchmark_dataloaders, benchmarks, check_benchmark, data_folder, fetch_benchmark,
                                               galaxy10_decals, galaxy10_sdss, galaxy10_sdss_classes, read_benchmark, resume_download)
from astroformer_astro.data.block import GalaxyDataLoaders
from astroformer_astro.data.hdf5 import read_hdf5, repack
from astroformer_astro.data.tensor import TensorGalaxy
from astroformer_astro.synth import synth_galaxy10

BODY = np.random.default_rng(0).bytes(1_000_000)


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        s, span = self.server, self.headers.get('Range')
        s.asked.append(span)
        start = int(span[6:-1]) if s.ranges and span else 0
        status = 416 if start >= len(s.body) else 206 if start else 200
        rest = s.body[start:] if s.status == 200 and status != 416 else b''
        time.sleep(s.silence)
        self.send_response(status if s.status == 200 else s.status)
        self.send_header('Content-Length', len(rest))
        self.end_headers()
        rest = rest[:s.allow.pop(0)] if s.allow else rest
        for i in range(0, len(rest), 2**16):
            self.wfile.write(rest[i:i + 2**16])
            time.sleep(s.pause)

    def log_message(self, *_): pass


class Server(http.server.ThreadingHTTPServer):
    "Hands out `body`: with ranges or without, breaking after so many bytes, slowly, silently, or not at all"
    daemon_threads = True
    def __init__(self, body=BODY, ranges=True, allow=(), pause=0, silence=0, status=200):
        super().__init__(('127.0.0.1', 0), Answer)
        self.body, self.ranges, self.allow, self.pause, self.silence, self.status, self.asked = body, ranges, list(allow), pause, silence, status, []
        self.url = f'http://127.0.0.1:{self.server_port}/a.h5'
    def handle_error(self, *_): pass        # the client hung up: that is what is tested
    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(.01,), daemon=True).start()
        return self
    def __exit__(self, *_): self.shutdown(); self.server_close()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch): monkeypatch.setattr(module, 'time', SimpleNamespace(sleep=lambda seconds: None))


def published(server, body=BODY, **kw):
    return replace(benchmarks['galaxy10_decals'], file='a.h5', url=server.url, sha256=hashlib.sha256(body).hexdigest(), **kw)


def names(folder): return sorted(p.name for p in Path(folder).iterdir() if not p.name.startswith('.'))


# --- downloading

def test_a_broken_download_goes_on_where_it_broke(tmp_path):
    with Server(allow=[300_000, 300_000]) as s:
        path = fetch_benchmark(published(s), tmp_path, progress=False)
        assert s.asked == [None, 'bytes=262144-', 'bytes=524288-']
    assert path.read_bytes() == BODY and names(tmp_path) == ['a.h5']


def test_a_server_without_ranges_starts_again(tmp_path):
    with Server(ranges=False, allow=[300_000]) as s:
        assert fetch_benchmark(published(s), tmp_path, progress=False).read_bytes() == BODY
        assert len(s.asked) == 2
    assert names(tmp_path) == ['a.h5']


def test_a_file_put_there_by_hand_is_checked_and_never_overwritten(tmp_path):
    (tmp_path/'a.h5').write_bytes(BODY[:-1])
    with Server() as s:
        with pytest.raises(GalaxyDataError, match='a.h5 has 999,999 bytes with SHA-256 .* so it is incomplete or another file'): fetch_benchmark(published(s), tmp_path)
        assert (tmp_path/'a.h5').read_bytes() == BODY[:-1]
        (tmp_path/'a.h5').write_bytes(BODY)
        assert fetch_benchmark(published(s), tmp_path) == tmp_path/'a.h5' and s.asked == []


def test_a_server_that_always_breaks_is_given_up_and_the_part_kept(tmp_path):
    with Server(ranges=False, allow=[300_000]*9) as s:
        with pytest.raises(GalaxyDataError, match=r'the connection broke\); the 262,144 bytes that came are kept and the next call goes on'):
            fetch_benchmark(published(s), tmp_path, progress=False)
        assert len(s.asked) == 2 and names(tmp_path) == ['a.h5.part']
        s.ranges, s.allow = True, []
        fetch_benchmark(published(s), tmp_path, progress=False)
        assert s.asked[2:] == ['bytes=262144-']
    assert names(tmp_path) == ['a.h5']


def test_another_file_is_deleted_and_the_next_call_starts_afresh(tmp_path):
    with Server(body=b'<html>Please log in</html>') as s:
        with pytest.raises(GalaxyDataError, match='delivered 26 bytes with SHA-256 .* is not the published a.h5 and was deleted'):
            fetch_benchmark(published(s), tmp_path, progress=False)
        assert names(tmp_path) == []
        s.body = BODY
        assert fetch_benchmark(published(s), tmp_path, progress=False).read_bytes() == BODY


@pytest.mark.parametrize('left', [b'x'*1000, BODY[:999_999] + b'!', BODY + b'more'], ids=['foreign', 'damaged', 'too long'])
def test_a_part_that_does_not_fit_never_becomes_the_file(tmp_path, left):
    (tmp_path/'a.h5.part').write_bytes(left)
    with Server() as s:
        with pytest.raises(GalaxyDataError, match='was deleted'): fetch_benchmark(published(s), tmp_path, progress=False)
        assert names(tmp_path) == []
        fetch_benchmark(published(s), tmp_path, progress=False)
    assert (tmp_path/'a.h5').read_bytes() == BODY


def test_a_complete_part_is_not_fetched_again(tmp_path):
    (tmp_path/'a.h5.part').write_bytes(BODY)
    with Server() as s:
        fetch_benchmark(published(s), tmp_path, progress=False)
        assert s.asked == ['bytes=1000000-']
    assert (tmp_path/'a.h5').read_bytes() == BODY


@settings(max_examples=25, deadline=None)
@given(st.booleans(), st.lists(st.integers(0, 1_000_000), max_size=6), st.integers(0, 500_000))
def test_whatever_happens_the_file_is_whole_or_absent(tmp_path_factory, ranges, allow, left):
    folder = tmp_path_factory.mktemp('d')
    (folder/'a.h5.part').write_bytes(BODY[:left])
    with Server(ranges=ranges, allow=allow) as s:
        try: assert fetch_benchmark(published(s), folder, progress=False).read_bytes() == BODY
        except GalaxyDataError as e:
            part = (folder/'a.h5.part').read_bytes()
            assert BODY.startswith(part) and ('kept' in str(e)) == bool(part) and names(folder) == ['a.h5.part']
        else: assert names(folder) == ['a.h5']


def child(server, folder):
    "Another process, forked: a new one would take ten seconds to import everything"
    p = multiprocessing.get_context('fork').Process(target=fetch_benchmark, args=(published(server), folder, False))
    p.start()
    return p


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(.02)


def test_killed_then_again_and_two_at_once(tmp_path):
    part = tmp_path/'a.h5.part'
    with Server(pause=.1) as s:
        one = child(s, tmp_path)
        wait_for(lambda: part.exists() and part.stat().st_size >= 2*2**16)
        one.kill(); one.join()
        kept = part.stat().st_size
        assert one.exitcode == -9 and names(tmp_path) == ['a.h5.part'] and 0 < kept < len(BODY)
        both = [child(s, tmp_path) for _ in range(2)]
        for p in both: p.join(60)
        assert [p.exitcode for p in both] == [0, 0]
        assert s.asked == [None, f'bytes={kept}-']           # one of them waited, and asked nobody
    assert (tmp_path/'a.h5').read_bytes() == BODY and names(tmp_path) == ['a.h5']


@pytest.mark.parametrize('url, why', [('http://galaxy10.invalid/a.h5', 'there is no connection'), ('http://127.0.0.1:9/a.h5', 'there is no connection')])
def test_offline_says_what_to_do_by_hand_and_soon(tmp_path, url, why):
    b, start = replace(benchmarks['galaxy10_sdss'], url=url), time.monotonic()
    with pytest.raises(GalaxyDataError) as e: fetch_benchmark(b, tmp_path)
    assert time.monotonic() - start < 10
    for said in (f'{tmp_path/b.file} is not there', url, why, 'by hand and put the file there', b.sha256): assert said in str(e.value)
    assert str(e.value).count('. ') == 0 and names(tmp_path) == []


def test_a_silent_server_is_left_and_an_answer_is_quoted(tmp_path, monkeypatch):
    with Server(silence=5) as s:
        start = time.monotonic()
        with pytest.raises(requests.Timeout): resume_download(s.url, tmp_path/'x', progress=False, timeout=.3)
        assert time.monotonic() - start < 2
    with Server(status=503) as s:
        with pytest.raises(GalaxyDataError, match='the server answered 503 Service Unavailable'): fetch_benchmark(published(s), tmp_path)
        assert len(s.asked) == 1                             # a server under load is not asked again at once
    monkeypatch.setattr(module.shutil, 'disk_usage', lambda folder: SimpleNamespace(free=10))
    with Server() as s:
        with pytest.raises(GalaxyDataError, match='make room, or name another folder'): fetch_benchmark(published(s), tmp_path)
    assert names(tmp_path) == []


def test_pooch_takes_the_downloader(tmp_path):
    with Server(allow=[300_000]) as s:
        got = pooch.retrieve(s.url, hashlib.sha256(BODY).hexdigest(), 'p.h5', tmp_path, downloader=lambda *a: resume_download(*a, progress=False))
    assert Path(got).read_bytes() == BODY and names(tmp_path) == ['p.h5']


def test_without_the_packages_their_extra_is_named(tmp_path, monkeypatch):
    for gone in 'pooch', 'requests', 'filelock':
        with monkeypatch.context() as m:
            m.setitem(sys.modules, gone, None)
            with pytest.raises(ImportError, match=r"pip install 'astroformer_astro\[download\]'"): fetch_benchmark('galaxy10_decals', None if gone == 'pooch' else tmp_path)


# --- Galaxy10

@pytest.fixture(scope='module')
def survey(tmp_path_factory):
    path = synth_galaxy10(tmp_path_factory.mktemp('survey')/'a.h5', n=120, size=40, seed=0)
    with h5py.File(path) as f: counts = tuple(np.bincount(f['ans'], minlength=10).tolist())
    return path, replace(benchmarks['galaxy10_decals'], file='a.h5', sha256=pooch.file_hash(str(path)), size=40, counts=counts)


def test_the_published_tables():
    "Written out once more, from the documentation of the files"
    assert benchmarks['galaxy10_decals'].counts == (1081, 1853, 2645, 2027, 334, 2043, 1829, 2628, 1423, 1873)
    assert benchmarks['galaxy10_decals'].classes == galaxy10_classes and galaxy10_classes[3] == 'In-between Round Smooth Galaxies'
    assert benchmarks['galaxy10_sdss'].counts == (3461, 6997, 6292, 349, 1534, 17, 589, 1121, 906, 519)
    assert galaxy10_sdss_classes[3] == 'Smooth, Cigar shaped' and sum(benchmarks['galaxy10_sdss'].counts) == 21785
    for name, kind in (('cifar10', datasets.CIFAR10), ('cifar100', datasets.CIFAR100)):
        assert (benchmarks[name].url, benchmarks[name].file) == (kind.url, kind.filename)


def test_the_environment_says_where(survey, monkeypatch, tmp_path):
    path, b = survey
    monkeypatch.setitem(benchmarks, 'galaxy10_decals', b)
    monkeypatch.setenv('ASTROFORMER_DATA', str(path.parent))
    assert galaxy10_decals() == path and data_folder() == path.parent
    monkeypatch.setenv('HOME', str(tmp_path)); monkeypatch.setenv('ASTROFORMER_DATA', '~/d')
    assert data_folder() == tmp_path/'d'


def test_a_file_with_other_contents_is_told_by_what_differs(survey):
    path, b = survey
    for change, said in ((dict(counts=(*b.counts[:9], 99)), "(published 99)"), (dict(size=256), '40 x 40 x 3; published are 256 x 256 x 3'),
                         (dict(classes=b.classes[:5], counts=b.counts[:5]), 'outside the 5 classes')):
        with pytest.raises(GalaxyDataError) as e: check_benchmark(replace(b, **change), path)
        assert said in str(e.value) and 'a.h5' in str(e.value)
    with pytest.raises(GalaxyDataError, match="published are 69 x 69"): check_benchmark('galaxy10_sdss', path)


def test_sdss_carries_its_own_names(survey, monkeypatch, tmp_path):
    path, b = survey
    (tmp_path/'a.h5').write_bytes(path.read_bytes())
    monkeypatch.setitem(benchmarks, 'galaxy10_sdss', replace(b, classes=galaxy10_sdss_classes))
    named = galaxy10_sdss(tmp_path)
    assert named == galaxy10_sdss(tmp_path) and named.name == 'Galaxy10_SDSS.h5'
    assert (tmp_path/'a.h5').read_bytes() == path.read_bytes()          # the published file stays as it was published
    g, plain = (read_hdf5(p, size=32, progress=False) for p in (named, path))
    assert g.classes == galaxy10_sdss_classes and np.array_equal(np.asarray(g.images), np.asarray(plain.images))
    assert [galaxy10_sdss_classes.index(l) for l in g.catalog.label] == [galaxy10_classes.index(l) for l in plain.catalog.label]
    assert read_benchmark('galaxy10_sdss', tmp_path, size=32, progress=False).classes == galaxy10_sdss_classes


def test_sdss_needs_no_second_copy_of_its_pixels(survey, monkeypatch, tmp_path):
    path, b = survey
    shutil.copy(path, tmp_path)
    monkeypatch.setitem(benchmarks, 'galaxy10_sdss', replace(b, classes=galaxy10_sdss_classes))
    named = galaxy10_sdss(tmp_path)
    assert named.stat().st_size < 10_000 < path.stat().st_size
    moved = tmp_path.rename(tmp_path.with_name('elsewhere'))             # together with the published file
    assert read_hdf5(moved/named.name, size=40, progress=False).classes == galaxy10_sdss_classes
    dls = GalaxyDataLoaders.from_hdf5(moved/named.name, size=32, bs=8, num_workers=2, progress=False)
    assert dls.one_batch()[0].shape == (8, 3, 32, 32)
    packed = repack(moved/named.name, 24, progress=False)
    assert read_hdf5(packed, 24, progress=False).classes == galaxy10_sdss_classes
    (moved/'a.h5').unlink()
    with pytest.raises(GalaxyDataError, match="Galaxy10_SDSS.h5 has no dataset 'images'"): read_hdf5(moved/named.name, size=40, progress=False)


def test_real_galaxies_in_the_published_layout(tmp_path):
    real = Path(__file__).parent.parent.parent/'shared'/'data'/'galaxy10_layout.h5'
    if not real.exists(): pytest.skip(f'no real galaxies: {real} is not there')
    file = shutil.copy(real, tmp_path)
    b = replace(benchmarks['galaxy10_decals'], file=real.name, sha256=pooch.file_hash(str(file)), counts=(12,)*10)
    dls = benchmark_dataloaders(b, tmp_path, size=64, bs=8, progress=False)
    assert dls.one_batch()[0].shape == (8, 3, 64, 64) and tuple(dls.classes) == galaxy10_classes and dls.groups is not None
    with pytest.raises(GalaxyDataError, match=r"12 of 'Disturbed Galaxies' \(published 1081\)"): check_benchmark('galaxy10_decals', file)


# --- photographs

def cifar(folder, kind, n, classes, per_batch=20):
    "An archive in torchvision's layout with random pictures, the Benchmark for it, and the checksums torchvision compares"
    rng, sums, archive = np.random.default_rng(n), {}, Path(folder)/kind.filename
    with tarfile.open(archive, 'w:gz') as t:
        def put(name, **entry):
            data = pickle.dumps(entry)
            sums[name], info = hashlib.md5(data).hexdigest(), tarfile.TarInfo(f'{kind.base_folder}/{name}')
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
        key = 'labels' if n == 10 else 'fine_labels'
        for name, _ in kind.train_list + kind.test_list:
            put(name, **{'data': rng.integers(0, 256, (per_batch, 3072), np.uint8), key: [k % n for k in range(per_batch)]})
        put(kind.meta['filename'], **{kind.meta['key']: classes})
    lists = {k: [[name, sums[name]] for name, _ in getattr(kind, k)] for k in ('train_list', 'test_list')}
    patched = dict(lists, tgz_md5=hashlib.md5(archive.read_bytes()).hexdigest(), meta=dict(kind.meta, md5=sums[kind.meta['filename']]))
    b = benchmarks['cifar10' if n == 10 else 'cifar100']
    files = len(kind.train_list + kind.test_list)
    return replace(b, url='http://127.0.0.1:9/', sha256=pooch.file_hash(str(archive)), counts=(per_batch*files//n,)*n), patched


@pytest.fixture(params=['cifar10', 'cifar100'])
def photographs(request, tmp_path, monkeypatch):
    kind, n = (datasets.CIFAR10, 10) if request.param == 'cifar10' else (datasets.CIFAR100, 100)
    b, patched = cifar(tmp_path, kind, n, benchmarks['cifar10'].classes if n == 10 else [f'c{k}' for k in range(n)], 20 if n == 10 else 100)
    for k, v in patched.items(): monkeypatch.setattr(kind, k, v)
    return b, kind, tmp_path


def test_cifar_as_officially_divided(photographs):
    b, kind, folder = photographs
    dls = benchmark_dataloaders(b, folder, bs=8, progress=False)
    test = kind(folder, train=False)
    assert [len(dls.train_ds), len(dls.valid_ds)] == [len(kind(folder, train=True)), len(test)]
    rows = np.asarray(dls.valid_ds.items)
    assert np.array_equal(dls.galaxies.images[rows], test.data) and [dls.vocab[k] for k in test.targets] == dls.catalog.label[rows].tolist()
    x, y = dls.one_batch()
    assert x.shape == (8, 3, 32, 32) and type(x) is TensorGalaxy and type(dls) is GalaxyDataLoaders
    assert benchmark_dataloaders(b, folder, size=48, bs=8, augment=None, progress=False).one_batch()[0].shape == (8, 3, 48, 48)


def test_cifar_unpacked_is_enough_and_a_damaged_file_is_unpacked_again(photographs):
    b, kind, folder = photographs
    whole = read_benchmark(b, folder, progress=False)
    batch = folder/kind.base_folder/kind.train_list[0][0]
    batch.write_bytes(batch.read_bytes()[:-10])
    assert np.array_equal(read_benchmark(b, folder, progress=False).images, whole.images)
    (folder/b.file).unlink()
    assert np.array_equal(read_benchmark(b, folder, progress=False).images, whole.images)
    batch.unlink()
    with pytest.raises(GalaxyDataError, match=f'{b.file} is not there and .* put the file there'): read_benchmark(b, folder, progress=False)


def test_no_pickle_is_opened_before_its_checksum_is_right(photographs, monkeypatch):
    b, kind, folder = photographs
    read_benchmark(b, folder, progress=False)
    (folder/b.file).unlink()
    opened = []
    monkeypatch.setattr(pickle, 'load', lambda f, **_: opened.append(f.name))
    (folder/kind.base_folder/kind.test_list[0][0]).write_bytes(pickle.dumps(dict(data=0, labels=[])))
    with pytest.raises(GalaxyDataError, match='is not there'): read_benchmark(b, folder, progress=False)
    assert not opened


def test_counts_and_names_of_photographs_are_compared(photographs):
    b, kind, folder = photographs
    for change, said in ((dict(counts=(7, *b.counts[1:])), r'\(published 7\)'), (dict(classes=('nothing',)*len(b.counts)), 'published are nothing, nothing')):
        with pytest.raises(GalaxyDataError, match=said): read_benchmark(replace(b, **change), folder, progress=False)


def test_tiny_imagenet_with_grey_pictures_and_a_shared_name(tmp_path):
    rng, ids = np.random.default_rng(0), ['n02', 'n01', 'n03']
    def jpeg(level, mode='RGB'):
        out = io.BytesIO()
        Image.fromarray((level + rng.integers(0, 3, (64, 64, 3))).astype(np.uint8)).convert(mode).save(out, 'JPEG')
        return out.getvalue()
    with ZipFile(tmp_path/'tiny-imagenet-200.zip', 'w') as z:
        root = 'tiny-imagenet-200/'
        z.writestr(root + 'wnids.txt', '\n'.join(ids))
        z.writestr(root + 'words.txt', 'n01\tcrane\nn02\tgoose, Anser\nn03\tcrane, hoist\nn77\tunused')
        for k, w in enumerate(ids):
            z.writestr(f'{root}train/{w}/{w}_boxes.txt', f'{w}_0.JPEG\t0\t0\t9\t9\n')
            for i in range(4): z.writestr(f'{root}train/{w}/images/{w}_{i}.JPEG', jpeg(60*k, 'L' if i == 2 else 'RGB'))
            z.writestr(f'{root}val/images/val_{k}.JPEG', jpeg(60*k))
        z.writestr(root + 'val/val_annotations.txt', ''.join(f'val_{k}.JPEG\t{w}\t0\t0\t9\t9\n' for k, w in enumerate(ids)))
        z.writestr(root + 'test/images/test_0.JPEG', jpeg(0))
    b = replace(benchmarks['tiny_imagenet'], url='http://127.0.0.1:9/', sha256=pooch.file_hash(str(tmp_path/'tiny-imagenet-200.zip')), counts=(5,)*3)
    g = read_benchmark(b, tmp_path, progress=False)
    assert g.classes == ('crane (n01)', 'goose', 'crane (n03)') and g.images.shape == (15, 64, 64, 3)
    brightness = dict(zip(['goose', 'crane (n01)', 'crane (n03)'], (1, 61, 121)))
    for img, label in zip(g.images, g.catalog.label): assert abs(img.mean() - brightness[label]) < 2
    assert g.catalog.groupby('split').size().to_dict() == dict(train=12, valid=3)
    assert benchmark_dataloaders(b, tmp_path, bs=4, progress=False).one_batch()[0].shape == (4, 3, 64, 64)
    assert names(tmp_path) == [b.file]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([32, 45, 64]), st.floats(0, .3))
def test_flip_shift_only_moves_pixels(seed, size, shift):
    "Every picture holds values of the original and no others; up stays up"
    torch.manual_seed(seed)
    x = TensorGalaxy(torch.rand(4, 3, size, size).mul(255).round()/255)
    y = FlipShift(shift)(x, split_idx=0)
    assert type(y) is TensorGalaxy and y.shape == x.shape and (y*255 - (y*255).round()).abs().max() < .02
    ramp = TensorGalaxy(torch.arange(size).float().view(1, 1, -1, 1).expand(4, 3, size, size)/size)
    inner = FlipShift(shift)(ramp, split_idx=0)[:, :, int(shift*size)+2:size-int(shift*size)-2]
    assert (inner.diff(dim=2) > 0).all()
