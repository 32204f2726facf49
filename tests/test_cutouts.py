"""Cut-outs from a service that misbehaves: a web server on this computer does it all; no request leaves it."""
import hashlib, multiprocessing, os, signal, socket, struct, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import numpy as np, pandas as pd, pytest
from astropy.io import fits
from PIL import Image, ImageFile

from astroformer_astro.core import GalaxyDataError
from astroformer_astro.data import cutouts
from astroformer_astro.data.cutouts import fetch_cutouts
from astroformer_astro.data.images import read_catalog

size = 16


def fits_body(q, blank=()):
    "A sound FITS answer to the query; bands in `blank` hold nothing"
    bands, n = q.get('bands') or q['hips'][-1], int(q.get('size') or q['width'])
    cube = np.stack([(b not in blank)*np.random.default_rng(int(float(q['ra'])*100)).normal(size=(n, n)) for b in bands]).astype('f4')
    fits.PrimaryHDU(cube if 'bands' in q else cube[0], fits.Header(dict(BANDS=bands) if 'bands' in q else {})).writeto(f := BytesIO())
    return f.getvalue()


def jpg_body(q, blank=False):
    n = int(q.get('size') or q['width'])
    pixels = np.random.default_rng(int(float(q['ra']))).integers(0, 255, (n, n, 3), np.uint8)
    Image.fromarray(pixels*(not blank)).save(f := BytesIO(), 'jpeg')
    return f.getvalue()


class Handler(BaseHTTPRequestHandler):
    protocol_version, wbufsize = 'HTTP/1.1', -1          # what is written leaves after the method, or when flushed
    def log_message(self, *args): pass

    def do_GET(self):
        s = self.server
        q = dict(parse_qsl(urlsplit(self.path).query))
        with s.lock: s.open += 1; s.most_open = max(s.most_open, s.open)
        s.asked.append((float(q['ra']), s.clock.now if s.clock else None, self.headers['User-Agent']))
        plan = s.plan.get(float(q['ra']), ['good'])
        how = plan.pop(0) if len(plan) > 1 else plan[0]
        try: getattr(self, how.split()[0])(q, *how.split()[1:])
        except OSError: self.close_connection = True            # the client has left
        finally:
            with s.lock: s.open -= 1

    def reply(self, body, status=200, kind='image/fits', length=None, **headers):
        self.send_response(status)
        for k, v in {'Content-Type': kind, 'Content-Length': len(body) if length is None else length, **headers}.items(): self.send_header(k.replace('_', '-'), v)
        self.end_headers()
        self.wfile.write(body)
        if length: self.close_connection = True

    def sound(self, q, **kw): return fits_body(q, **kw) if 'fits' in self.path.replace('hips2fits', '') else jpg_body(q, **kw)
    def good(self, q): self.reply(self.sound(q))
    def status(self, q, code, after=None): self.reply(b'<h1>Sorry</h1> too busy', int(code), 'text/html', **({'Retry-After': after} if after else {}))
    def page(self, q): self.reply(b'<!DOCTYPE html><html><h1>Down for</h1> maintenance</html>', 200, 'text/html')
    def empty(self, q): self.reply(b'')
    def short(self, q): self.reply(self.sound(q)[:-700], length=len(self.sound(q)))
    def cut(self, q): self.reply(self.sound(q)[:-700])
    def noise(self, q): self.reply(self.sound(q)[:9] + bytes(3000))
    def blank(self, q, bands=None): self.reply(self.sound(q, blank=bands or True) if 'jpeg' in self.path else fits_body(q, blank=bands or 'grz'))
    def nothing(self, q):
        fits.PrimaryHDU().writeto(f := BytesIO())
        self.reply(f.getvalue())
    def smaller(self, q): self.reply(self.sound(q | dict(size='8', width='8')))
    def other(self, q): self.reply(fits_body(q | dict(bands='gri')))
    def overlap(self, q): self.reply(b'No overlap', 500, 'text/plain')

    def reset(self, q):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))      # closing is a reset then
        self.close_connection = True

    def silent(self, q):
        self.server.released.wait(20)
        self.close_connection = True

    def half(self, q):
        body = self.sound(q)
        self.send_response(200); self.send_header('Content-Length', len(body)); self.end_headers()
        self.wfile.write(body[:len(body)//2]); self.wfile.flush()
        self.server.reached.set()
        self.server.released.wait(20)
        self.close_connection = True

    def endless(self, q):
        self.send_response(200); self.end_headers()
        self.close_connection = True
        self.wfile.write(self.sound(q)[:2880])
        while self.server.sent < 10**8: self.server.sent += self.wfile.write(bytes(2**16))

    def drip(self, q):
        self.send_response(200); self.end_headers()
        self.close_connection = True
        for _ in range(2000):
            self.wfile.write(b'S'); self.wfile.flush()
            if self.server.released.wait(.002): break


class Server(ThreadingHTTPServer):
    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.plan, self.asked, self.open, self.most_open, self.sent, self.clock = {}, [], 0, 0, 0, None
        self.lock, self.released, self.reached = threading.Lock(), threading.Event(), threading.Event()
        self.url = f'http://127.0.0.1:{self.server_port}'
    def handle_error(self, *args): pass
    def shutdown_request(self, request): request.close()
    def times(self, ra): return [t for r, t, _ in self.asked if r == ra]


class Clock:
    "Time that passes only while somebody sleeps, or by `tick` at every look at it"
    def __init__(self): self.now, self.tick = 0., 0.
    def monotonic(self):
        self.now += self.tick
        return self.now
    def sleep(self, seconds): self.now += seconds


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    s = Server()
    threading.Thread(target=s.serve_forever, args=(.01,), daemon=True).start()
    yield s
    s.released.set()
    s.shutdown()
    s.server_close()


@pytest.fixture
def fetch(server, tmp_path, monkeypatch):
    "`fetch_cutouts` from the misbehaving server, where waiting costs no time"
    server.clock = Clock()
    monkeypatch.setattr(cutouts, 'time', server.clock)
    def run(table=None, folder=tmp_path/'out', **kw):
        table = catalog(6) if table is None else table
        return fetch_cutouts(table, folder, **dict(size=size, base_url=server.url + kw.pop('page', '/viewer'), timeout=5, progress=False) | kw)
    return run


def catalog(n, **columns): return pd.DataFrame(dict(ra=np.arange(n)*1. + 10, dec=np.arange(n)*1. - 2, **columns))
def tree(folder): return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob('*')) if p.is_file()}


@pytest.mark.parametrize('how, least', [('status 429', 1), ('status 429 45', 45), ('status 503', 1), ('status 503 300', 300), ('status 500', 1), ('status 408', 1),
                                        ('page', 1), ('empty', 1), ('short', 1), ('cut', 1), ('noise', 1), ('reset', 1), ('status 429 soon', 1)])
@pytest.mark.parametrize('format', ['fits', 'jpg'])
def test_what_passes_is_tried_again(fetch, server, how, least, format):
    server.plan = {12.: [how, 'good'], 13.: [how, how, 'good']}
    m = fetch(format=format)
    assert list(m.status) == ['ok']*6
    assert [len(server.times(r)) for r in (11, 12, 13)] == [1, 2, 3]
    first, second = np.diff(server.times(13))
    assert least <= first <= max(3, least) and max(2, least) <= second <= max(6, least)


@pytest.mark.parametrize('how, says', [('status 404', 'HTTP 404: Sorry too busy'), ('status 400', 'HTTP 400'), ('smaller', 'and not the 3 x 16 x 16 asked for'),
                                       ('other', 'has the bands gri and not the grz'), ('endless', 'larger than')])
def test_what_does_not_pass_is_not(fetch, server, how, says):
    server.plan = {12.: [how]}
    m = fetch()
    assert list(m.status) == ['ok']*2 + ['failed'] + ['ok']*3 and says in m.problem[2] and pd.isna(m.file[2])
    assert len(server.times(12)) == 1
    assert server.sent < 4e7          # what had been sent by the time the client left: the buffers, not the whole


def test_silence_and_drops(fetch, server):
    server.plan = {11.: ['silent', 'good'], 12.: ['silent'], 13.: ['drip']}
    server.clock.tick = .1
    m = fetch(timeout=.2, tries=2)
    assert list(m.status) == ['ok', 'ok', 'failed', 'failed', 'ok', 'ok']
    assert m.problem[2] == 'no answer within 0.2 s (the last of 2 tries)' and 'not complete after 2 s' in m.problem[3]


def test_one_that_never_comes_does_not_stop_the_others(fetch, server, capsys):
    server.plan = {12.: ['status 503'], 14.: ['page']}
    m = fetch(tries=3)
    assert list(m.status) == ['ok', 'ok', 'failed', 'ok', 'failed', 'ok'] and len(server.times(12)) == 3
    assert 'HTTP 503 (the last of 3 tries)' == m.problem[2] and 'there came: Down for maintenance' in m.problem[4]
    assert '4 complete' in (said := capsys.readouterr().out) and '2 failed (row 2: HTTP 503' in said and 'and 1 more' in said


def test_a_service_that_is_down_is_left_alone(fetch, server, tmp_path):
    server.plan = {float(r): ['status 503'] for r in range(12, 100)}
    with pytest.raises(GalaxyDataError, match='legacy was given up: 3 objects in a row.*HTTP 503.*2 of 50 cut-outs are in') as e:
        server.plan[11.] = ['good', 'status 503']
        fetch(catalog(50), give_up=3, tries=2)
    assert '\n' not in str(e.value) and len(server.asked) == 2 + 3*2 + 2      # the last two ask once more for what came before
    m = pd.read_csv(tmp_path/'out'/'manifest.csv')
    assert len(m) == 50 and (m.status == 'failed').sum() == 48 and 'given up' in m.problem[49]
    server.plan = {}
    assert set(fetch(catalog(50)).status) == {'ok'} and len(server.times(10)) == 1


def test_objects_at_fault_do_not_pass_for_a_service_that_is_down(fetch, server):
    server.plan = {float(r): ['status 500'] for r in range(12, 22)}
    m = fetch(catalog(16), give_up=3, tries=2)
    assert list(m.status) == ['ok']*2 + ['failed']*10 + ['ok']*4


def test_a_service_that_is_never_up(fetch, server):
    server.plan = {float(r): ['status 404'] for r in range(10, 60)}
    with pytest.raises(GalaxyDataError, match='0 of 50'): fetch(catalog(50))
    assert len(server.asked) == 5


def test_a_long_retry_after_ends_the_run(fetch, server):
    server.plan = {12.: ['status 429 7200']}
    with pytest.raises(GalaxyDataError, match='come back in 120 minutes; 2 of 6'): fetch()
    assert len(server.asked) == 3


def test_blank_and_partial(fetch, server, tmp_path):
    server.plan = {10.: ['blank'], 11.: ['blank z'], 12.: ['nothing'], 13.: ['overlap']}
    m = fetch()
    assert list(m.status) == ['blank', 'partial', 'blank', 'blank', 'ok', 'ok'] and m.problem[1] == 'no data in z' and m.missing[1] == 'z'
    assert list(m.file.notna()) == [False, True, False, False, True, True]
    assert {p.name for p in (tmp_path/'out').glob('*.fits')} == set(m.file.dropna())
    asked = len(server.asked)
    assert fetch().equals(m) and len(server.asked) == asked
    server.plan = {10.: ['blank']}
    assert list(fetch(format='jpg').status) == ['blank'] + ['ok']*5


def test_politeness(fetch, server):
    server.plan = {12.: ['status 503', 'reset', 'good']}
    fetch(catalog(20), rate=4)
    gaps = np.diff([t for _, t, _ in server.asked])
    assert len(gaps) == 21 and gaps.min() >= .25 - 1e-9 and np.median(gaps) < .26
    assert server.most_open == 1
    assert all(a.startswith('astroformer_astro/0.') for _, _, a in server.asked)


def test_the_wait_outlasts_the_last_try(fetch, server):
    server.plan = {12.: ['status 429 100']}
    fetch(tries=2)
    assert server.times(13)[0] - server.times(12)[-1] >= 100


def test_cache_and_keys(fetch, server, tmp_path):
    m = fetch(name='id', table=catalog(6, id=list('abcdef')))
    before = tree(tmp_path/'out')
    assert fetch(name='id', table=catalog(6, id=list('abcdef'))).equals(m)
    assert len(server.asked) == 6 and tree(tmp_path/'out') == before
    assert fetch().sha256.equals(m.sha256) and len(server.asked) == 6                 # other names, same requests
    fetch(catalog(8)); assert len(server.asked) == 8
    for change in dict(pxscale=.5), dict(layer='ls-dr9'), dict(bands='gr'), dict(format='jpg'), dict(size=20):
        asked = len(server.asked)
        assert set(fetch(**change).status) == {'ok'} and len(server.asked) == asked + 6
    fetch(folder=tmp_path/'else', cache=tmp_path/'out'/'.cache')
    assert len(server.asked) == 8 + 30


def test_what_was_changed_since_is_fetched_again(fetch, server, tmp_path):
    m = fetch()
    before = tree(tmp_path/'out')
    with fits.open(tmp_path/'out'/m.file[1], mode='update') as f: f[0].data[:] = 7    # the same file as that of the cache
    (tmp_path/'out'/m.file[2]).unlink()
    fetch()
    assert len(server.asked) == 7 and tree(tmp_path/'out') == before


def test_copies_where_there_are_no_links(fetch, tmp_path, monkeypatch):
    def link(*args): raise OSError('not here')
    m = fetch()
    monkeypatch.setattr(os, 'link', link)
    assert fetch(folder=tmp_path/'copies').equals(m) and tree(tmp_path/'copies') == tree(tmp_path/'out')


def test_pixel_scale_by_row_and_the_catalogue_s_columns(fetch, tmp_path):
    m = fetch(catalog(3, scale=[.2, .3, .4], size=[9, 9, 9], label=list('aab')), pxscale='scale')
    assert list(m.pxscale) == [.2, .3, .4] and 'pixscale=0.3&' in m.url[1] and list(m['size']) == [size]*3 and list(m.size_given) == [9]*3
    read = pd.read_csv(tmp_path/'out'/'manifest.csv')
    assert list(read) == list(m) and list(read.label) == list('aab') and list(read.bytes) == list(m.bytes)


def test_second_provider_takes_over_what_failed(fetch, server, tmp_path):
    pytest.importorskip('astroquery')
    server.plan = {12.: ['status 404']}
    first = fetch()
    server.plan = {11.: ['good', 'blank z', 'good'], 12.: ['status 503', 'good']}
    second = fetch(first[first.status != 'ok'], provider='hips', page='/hips2fits')
    assert list(second.status) == ['ok'] and second.provider[0] == 'hips' and list(second) == list(first) and len(second.url[0].split()) == 3
    cube, header = fits.getdata(tmp_path/'out'/second.file[0], header=True)
    assert cube.shape == (3, size, size) and cube.dtype == '>f4' and header['BANDS'] == 'grz'
    assert fetch(first[first.status != 'ok'], provider='hips', page='/hips2fits').equals(second) and len(server.times(12)) == 1 + 4
    colour = fetch(catalog(2), provider='hips', format='jpg', page='/hips2fits')
    assert list(colour.status) == ['ok']*2 and colour.bands[0] == 'color' and 'DR10%2Fcolor' in colour.url[0]


def test_a_disk_that_is_full(fetch, server, tmp_path, monkeypatch):
    write, left = Path.write_bytes, [3]
    def full(self, body):
        if 'cache' in str(self): left[0] -= 1
        if left[0] < 0: raise OSError(28, 'No space left on device')
        return write(self, body)
    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(GalaxyDataError, match='No space left on device'): fetch()
    monkeypatch.undo()
    assert len(list((tmp_path/'out').glob('*.fits'))) == 3 and not list((tmp_path/'out').rglob('*.tmp'))
    monkeypatch.setattr(cutouts, 'time', server.clock)
    fetch()
    assert len(server.asked) == 7                     # the fourth was asked for twice


def test_a_folder_that_cannot_be_written(fetch, server, tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(GalaxyDataError, match='cannot be written'): fetch(folder=tmp_path/'file'/'out')
    assert not server.asked


def test_progress(fetch, monkeypatch):
    seen = []
    def bar(steps, show):
        for s in steps: seen.append(show); yield s
    monkeypatch.setattr(cutouts, 'bar', bar)
    fetch(progress=True)
    assert seen == [True]*6


def test_manifest_is_a_catalogue(fetch, tmp_path):
    m = fetch(catalog(6, label=['spiral', 'merger']*3), format='jpg', size=32)
    for table, folder in (m, tmp_path/'out'), (tmp_path/'out'/'manifest.csv', None):      # as from_catalog passes them on
        galaxies = read_catalog(table, folder, size=32, progress=False)
        assert galaxies.classes == ('merger', 'spiral') and galaxies.catalog.pxscale.eq(.262).all() and galaxies.catalog.ra.equals(m.ra)


def test_half_a_picture_is_seen_where_pillow_was_told_to_take_it(fetch, server, monkeypatch):
    monkeypatch.setattr(ImageFile, 'LOAD_TRUNCATED_IMAGES', True)
    server.plan = {12.: ['cut', 'good']}
    assert list(fetch(format='jpg').status) == ['ok']*6 and len(server.times(12)) == 2


def doomed(folder, url, victim, count):
    "In a process of its own: fetch, and die by SIGKILL at the given call of `victim`"
    calls = iter(range(count))
    def die(*args, **kw):
        if next(calls, None) is not None: return kept(*args, **kw)
        if victim == 'write_bytes': kept(args[0], args[1][:999])
        os.kill(os.getpid(), signal.SIGKILL)
    if victim:
        where = dict(replace=os, link=os, write_bytes=Path, to_csv=pd.DataFrame)[victim]
        kept = getattr(where, victim)
        setattr(where, victim, die)
    fetch_cutouts(catalog(4), folder, size=size, base_url=url, rate=1000, pause=.001, progress=False)


@pytest.fixture(scope='module')
def context():
    c = multiprocessing.get_context('forkserver')
    c.set_forkserver_preload(['astroformer_astro.data.cutouts', 'http.server', 'pytest', 'requests'])
    return c


@pytest.mark.skipif(os.name != 'posix', reason='signals of another kind')
def test_kill_9_leaves_no_trace(server, tmp_path, context):
    "Killed at every moment at which the disk changes, and half-way through an answer; then the same again"
    def again(folder): return fetch_cutouts(catalog(4), folder, size=size, base_url=server.url, rate=1000, pause=.001, progress=False)
    server.plan = {12.: ['blank z'], 13.: ['blank']}
    again(tmp_path/'whole')
    whole = tree(tmp_path/'whole')
    moments = [('replace', k) for k in range(9)] + [('link', 1), ('write_bytes', 2), ('to_csv', 0), ('', 0)]
    for victim, k in moments:
        folder = tmp_path/f'{victim}{k}'
        if not victim: server.plan[11.] = ['half', 'good']
        p = context.Process(target=doomed, args=(folder, server.url, victim, k))
        p.start()
        if not victim:
            assert server.reached.wait(20)
            os.kill(p.pid, signal.SIGKILL)
        p.join(20)
        assert p.exitcode == -signal.SIGKILL and tree(folder) != whole, (victim, k)
        asked, kept = len(server.asked), len(list((folder/'.cache').glob('[0-9a-f]*')))
        again(folder)
        assert tree(folder) == whole, (victim, k)
        assert len(server.asked) - asked == 4 - kept, (victim, k)


def test_no_connection_is_said_at_once(tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        closed = s.getsockname()[1]          # nobody listens there once it is given back
    start = time.monotonic()
    with pytest.raises(GalaxyDataError, match='there is no connection to 127.0.0.1'):
        fetch_cutouts(pd.DataFrame(dict(ra=[150., 151.], dec=[2., 2.])), tmp_path, size=64, base_url=f'http://127.0.0.1:{closed}', rate=100, progress=False)
    assert time.monotonic() - start < 5 and (pd.read_csv(tmp_path/'manifest.csv').status == 'failed').all()
