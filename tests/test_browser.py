"A real browser in front of a real JupyterLab: what is clicked is what is seen, nothing is swallowed, and nothing leaves the machine"
import json, os, shutil, socket, subprocess, sys, time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import nbformat, pytest
from nbformat.v4 import new_code_cell, new_notebook

root = Path(__file__).parent.parent
chromium = shutil.which('chromium') or shutil.which('chromium-browser')
flags = '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'.split()
seconds = 1000


def lacking():
    "What is missing to run a browser, or an empty text"
    try: import playwright.sync_api
    except ImportError: return 'playwright is not installed'
    return '' if chromium else 'there is no chromium; on Debian: apt-get install chromium'


@pytest.fixture(scope='module')
def browser():
    if lacking() and os.environ.get('CI') == 'true': pytest.fail(lacking())
    if lacking(): pytest.skip(lacking())
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium, args=flags)
        yield b
        b.close()


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def answers(url):
    try: return urlopen(url, timeout=5).status == 200
    except (URLError, OSError): return False


@pytest.fixture
def lab(tmp_path):
    "JupyterLab on loopback in a folder of its own, with no settings but that it asks nobody for news; `(address, folder)`"
    folder, config, port = tmp_path/'notebooks', tmp_path/'config', free_port()
    folder.mkdir(); (config/'labconfig').mkdir(parents=True)
    (config/'labconfig'/'page_config.json').write_text(json.dumps(dict(disabledExtensions={'@jupyterlab/apputils-extension:announcements': True})))
    env = os.environ | dict(JUPYTER_CONFIG_DIR=str(config), JUPYTER_RUNTIME_DIR=str(tmp_path/'runtime'), IPYTHONDIR=str(tmp_path/'ipython'), OMP_NUM_THREADS='1', PYTHONPATH=str(root))
    options = dict(ip='127.0.0.1', port=port, port_retries=0, root_dir=folder, allow_root=True, open_browser=False)
    command = [sys.executable, '-m', 'jupyterlab', '--IdentityProvider.token=here'] + [f'--ServerApp.{k}={v}' for k, v in options.items()]
    with open(tmp_path/'lab.log', 'wb') as log: server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    address = f'http://127.0.0.1:{port}'
    try:
        for _ in range(240):
            if server.poll() is not None or answers(f'{address}/api'): break
            time.sleep(.25)
        else: pytest.fail('JupyterLab did not start: ' + (tmp_path/'lab.log').read_text()[-2000:])
        yield address, folder
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()


class Watched:
    "A page in which every error on the console and every request to elsewhere is noted; the latter do not get through"
    def __init__(self, browser, address):
        self.page, self.errors, self.outside = browser.new_page(viewport=dict(width=1300, height=4500)), [], []
        self.page.set_default_timeout(30*seconds)
        self.page.on('console', lambda m: self.errors.append(m.text) if m.type == 'error' else None)
        self.page.on('pageerror', lambda e: self.errors.append(str(e)))
        self.page.on('websocket', lambda w: self.outside.append(w.url) if not w.url.startswith(address.replace('http', 'ws')) else None)
        self.page.route(lambda url: not url.startswith((address, 'data:', 'blob:')), self.refuse)

    def refuse(self, route):
        self.outside.append(route.request.url)
        route.abort()

    def run_all(self, address, name, last, timeout):
        "Open a notebook, run all of it, and wait for a dropdown in the cell `last`"
        self.page.goto(f'{address}/doc/tree/{name}?token=here')
        self.page.locator('.jp-Notebook .jp-Cell').first.click()
        self.page.get_by_text('Kernel status: Idle').first.wait_for(state='attached')
        self.page.locator('.lm-MenuBar-itemLabel', has_text='Run').click()
        self.page.get_by_text('Run All Cells', exact=True).click()
        self.page.locator('.jp-Cell').nth(last).locator('.widget-dropdown').first.wait_for(timeout=timeout*seconds)
        assert not self.page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]').count(), self.page.locator('.jp-OutputArea-output').all_inner_texts()


class Face:
    "What a person sees of the widgets in one output of the notebook"
    def __init__(self, page, output): self.page, self.output = page, page.locator('.jp-Cell').nth(output).locator('.jp-OutputArea-output')
    def picture(self, alt): return self.output.locator(f'img[alt="{alt}"]')
    def bytes(self, picture):
        "Length and checksum of what an `img` shows"
        return picture.evaluate('''async img => { const b = new Uint8Array(await (await fetch(img.src)).arrayBuffer());
                                                  return [b.length, b.reduce((s, v) => (31*s + v) % 1000003, 7), img.naturalWidth > 0] }''')
    def becomes_another(self, picture, before):
        for _ in range(300):
            if picture.is_visible() and (now := self.bytes(picture)) != before and now[2]: return now
            self.page.wait_for_timeout(100)
        raise AssertionError('the picture stayed as it was')
    def choose(self, label, option): self.output.locator('.widget-dropdown', has=self.page.get_by_text(label, exact=True)).locator('select').select_option(option)
    def press(self, label): self.output.get_by_role('button', name=label, exact=True).first.click()
    def says(self, text): self.output.get_by_text(text).first.wait_for(timeout=30*seconds)


preparing = '''
from astroformer_astro.all import *
seed_everything(0)
dls = GalaxyDataLoaders.from_hdf5(synth_galaxy10('galaxies.h5', n=200, size=64, seed=0), bs=32, progress=False)
learn = astroformer_learner(dls, 'astroformer_nano', drop_path=0., lr=5e-3)
learn.remove_cb(learn.progress)
with learn.no_logging(): learn.fit_one_cycle(2)
'''
core_alone = '''
import sys
from astroformer_astro.widgets import parts
sys.modules['anywidget'] = None; parts._sensor.cache_clear()
GalaxyExplorer(learn)
'''
explained, compared, attended = 'galaxy, probabilities and attribution', 'two maps side by side', 'where the query looks'


def test_widgets_in_a_browser(browser, lab):
    address, folder = lab
    cells = [preparing, 'GalaxyExplorer(learn)', 'AugmentPreview(learn)', "Relabel(learn, 'decisions.csv')", core_alone]
    nbformat.write(new_notebook(cells=[new_code_cell(c.strip()) for c in cells], metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python'))), folder/'small.ipynb')
    watched = Watched(browser, address)
    watched.run_all(address, 'small.ipynb', 4, 150)
    explore(Face(watched.page, 1), folder)
    augment(Face(watched.page, 2))
    relabel(Face(watched.page, 3), folder)
    explore_without_anywidget(Face(watched.page, 4))
    if (keep := os.environ.get('SCREENSHOTS')): watched.page.screenshot(path=f'{keep}/widgets.png')
    assert watched.errors == [] and watched.outside == []


def explore(face, folder):
    upper, lower = face.picture(explained), face.picture(attended)
    face.says('galaxy 1 of 40')
    first, looked = face.bytes(upper), face.bytes(lower)
    face.picture('galaxy 3 of this page').click()                                   # choose a galaxy
    face.says('galaxy 3 of 40')
    second = face.becomes_another(upper, first)
    looked = face.becomes_another(lower, looked)
    face.choose('method', 'saliency')                                               # change the method
    third = face.becomes_another(upper, second)
    lower.click(position=dict(x=40, y=60))                                          # click a pixel
    looked = face.becomes_another(lower, looked)
    assert face.bytes(upper) == third, 'the attribution does not depend on where the attention looks from'
    upper.click(position=dict(x=60, y=90)); lower.press('ArrowRight')               # the keyboard
    face.says('galaxy 4 of 40')
    third = face.becomes_another(upper, third)
    face.press('export')
    face.says('written:')
    exported, = folder.glob('galaxy_3_saliency_for_*.png')
    assert exported.read_bytes().startswith(b'\x89PNG')
    face.choose('beside', 'pinned galaxy')                                          # force an error
    face.says('no galaxy is pinned')
    face.press('pin this galaxy'); face.press('‹')                                  # mend it: this one, beside the one before
    face.picture(compared).wait_for()
    face.choose('and not', 'Merging'); face.choose('stretch', 'asinh')
    face.becomes_another(upper, third)
    face.output.get_by_label('wrong only').check()
    face.output.get_by_text('galaxy 1 of 40').wait_for(state='detached')


def augment(face):
    picture = face.picture('a galaxy before and after augmentation')
    before = face.bytes(picture)
    face.output.locator('.widget-slider').filter(has_text='fwhm').locator('.noUi-handle').press('PageUp')
    face.becomes_another(picture, before)
    face.says('Seeing(fwhm=')


def relabel(face, folder):
    picture = face.picture('the galaxy and its probabilities')
    face.says('0 decided')
    before = face.bytes(picture)
    face.output.get_by_role('button').nth(1).click()
    face.says('1 decided')
    face.becomes_another(picture, before)
    picture.click(); picture.press('u')
    face.says('2 decided')
    assert len((folder/'decisions.csv').read_text().splitlines()) == 3


def explore_without_anywidget(face):
    pictures = face.output.locator('img.widget-image')
    upper = pictures.nth(16)
    face.says('galaxy 1 of 40')
    before = face.bytes(upper)
    face.output.locator('button.jupyter-button').nth(4).click()
    face.says('galaxy 5 of 40')
    before = face.becomes_another(upper, before)
    face.choose('method', 'saliency')
    face.becomes_another(upper, before)


@pytest.mark.slow
def test_the_first_tutorial_in_a_browser(browser, lab):
    address, folder = lab
    shutil.copy(root/'nbs'/'70_tutorial.first_galaxies.ipynb', folder/'tutorial.ipynb')
    watched = Watched(browser, address)
    explorer = next(i for i, c in enumerate(nbformat.read(folder/'tutorial.ipynb', 4).cells) if c.source.startswith('GalaxyExplorer'))
    watched.run_all(address, 'tutorial.ipynb', explorer, 540)
    face = Face(watched.page, explorer)
    upper = face.picture(explained)
    before = face.bytes(upper)
    face.picture('galaxy 2 of this page').click()
    face.becomes_another(upper, before)
    assert watched.errors == [] and watched.outside == []
