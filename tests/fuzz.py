"""Damage one file of a small survey in many random ways and read it: `python tests/fuzz.py hdf5|fits|jpeg FIRST LAST`.

Each case must end in a `GalaxyDataError` or in the right galaxies under the right labels. What did not is printed, one line a case. A hang is ended by an alarm, and a crash of the interpreter by the status.
Pixels are compared where the file carries a checksum (packed HDF5, FITS with DATASUM); where it has none, as a JPEG, only labels, shapes and types can be.
"""
import shutil, signal, sys, tempfile, traceback
from pathlib import Path

import h5py, numpy as np, pandas as pd
from astropy.io import fits
from PIL import Image

from astroformer_astro.core import GalaxyDataError
from astroformer_astro.data.fits import read_fits_catalog
from astroformer_astro.data.hdf5 import pack, read_hdf5
from astroformer_astro.data.images import read_catalog
from astroformer_astro.synth import synth_arrays, synth_fits, synth_galaxy10

n = 12


def bytes_of(path, rng):
    "Cut it short, flip bits, overwrite a stretch, or put rubbish behind it"
    data = bytearray(path.read_bytes())
    at, kind = int(rng.integers(len(data))), rng.integers(4)
    if kind == 0: data = data[:at]
    elif kind == 1:
        for i in rng.integers(len(data), size=rng.integers(1, 40)): data[i] ^= 1 << int(rng.integers(8))
    elif kind == 2: data[at:at + 200] = rng.bytes(len(data[at:at + 200]))
    else: data += rng.bytes(300)
    path.write_bytes(data)


def hdf5_inside(path, rng):
    "Swap two datasets, drop one, or give one another type or another shape"
    with h5py.File(path, 'a') as f:
        a, b = rng.permutation([k for k in f if isinstance(f[k], h5py.Dataset)])[:2]
        data, kind = f[a][()], rng.integers(4)
        if kind == 0: f.move(a, 'kept'); f.move(b, a); f.move('kept', b)
        elif kind == 1: del f[a]
        elif kind == 2: del f[a]; f[a] = data.astype(rng.choice(['f4', 'i8', 'S3', 'c8']))
        else: del f[a]; f[a] = data[:-1] if rng.random() < .5 else data[..., None]


def fits_inside(path, rng):
    "Change a header card or the type of the pixels"
    with fits.open(path) as hdus:
        data, header = hdus[0].data, hdus[0].header
        for sum_ in 'CHECKSUM', 'DATASUM': header.remove(sum_)          # or they would give the change away
        kind = rng.integers(3)
        if kind == 0: data = data.astype(rng.choice(['>i2', '>f8', '>i4']))
        elif kind == 1: header[str(rng.choice(['BANDS', 'BUNIT', 'CTYPE1', 'CRVAL1', 'CD1_1', 'BSCALE']))] = rng.choice(['', 'nonsense', '9e99'])
        else: data = data[: int(rng.integers(0, len(data)))]
        fits.PrimaryHDU(data, header).writeto(path, overwrite=True, output_verify='ignore')


class Hdf5:
    inside = staticmethod(hdf5_inside)
    def __init__(self, folder):
        self.file = pack(read_hdf5(synth_galaxy10(folder/'s.h5', n=n, size=32, seed=0, balance='uniform'), 32, progress=False), folder/'packed.h5', progress=False)
        self.truth = read_hdf5(self.file, 32, progress=False)
        self.pixels = np.array(self.truth.images)
    def targets(self, folder): return [folder/'packed.h5']
    def read(self, folder): return read_hdf5(folder/'packed.h5', 32, progress=False)
    def wrong(self, g):
        if list(g.catalog.label) != list(self.truth.catalog.label): return 'labels'
        if not np.array_equal(np.array(g.images), self.pixels): return 'pixels'


class Fits:
    inside = staticmethod(fits_inside)
    def __init__(self, folder):
        self.table = pd.read_csv(synth_fits(folder, n=n, size=32, seed=0, balance='uniform'))
        self.truth = self.read(folder)
    def targets(self, folder): return sorted(folder.glob('*.fits'))[:1]
    def read(self, folder): return read_fits_catalog(self.table, folder, size=32, bands='grizy', unit='nanomaggies', bad='skip', progress=False)
    def wrong(self, g):
        row = {f: i for i, f in enumerate(self.table.file)}
        for i, f in enumerate(g.catalog.file):
            if g.catalog.label[i] != self.table.label[row[f]]: return f'label of {f}'
            if not np.isfinite(g.images[i]).all(): return f'gaps in {f}'
            if self.summed and not np.allclose(g.images[i], self.truth.images[row[f]], atol=1e-6): return f'pixels of {f}'


class Jpeg:
    inside = staticmethod(bytes_of)
    def __init__(self, folder):
        d = synth_arrays(n, 48, seed=0, balance='uniform')
        for i, img in enumerate(d['images']): Image.fromarray(img).save(folder/f'{i}.jpg')
        self.table = pd.DataFrame(dict(file=[f'{i}.jpg' for i in range(n)], label=['spiral', 'elliptical']*(n//2)))
        self.table.to_csv(folder/'survey.csv', index=False)
    def targets(self, folder): return [folder/'0.jpg', folder/'survey.csv']
    def read(self, folder): return read_catalog(folder/'survey.csv', size=32, bad='skip', classes=('elliptical', 'spiral'), progress=False)
    def wrong(self, g):
        truth = dict(zip(self.table.file, self.table.label))
        for f, l in zip(g.catalog.file, g.catalog.label):
            if truth.get(f) != l: return f'label of {f}'
        if g.images.shape[1:] != (32, 32, 3) or g.images.dtype != np.uint8: return 'shape or type'


def case(kind, source, seed):
    "`None`, or what is wrong"
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)/'survey'
        shutil.copytree(source, d)
        target = rng.choice(kind.targets(d))
        inside = rng.random() < .4
        kind.summed = not inside
        (kind.inside if inside else bytes_of)(target, rng)
        signal.alarm(60)
        try: return kind.wrong(kind.read(d))
        except GalaxyDataError: return None
        except Exception: return traceback.format_exc().replace('\n', ' | ')[-600:]
        finally: signal.alarm(0)


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as source:
        kind = dict(hdf5=Hdf5, fits=Fits, jpeg=Jpeg)[sys.argv[1]](Path(source))
        for seed in range(*map(int, sys.argv[2:4])):
            problem = case(kind, source, seed)
            if problem: print(seed, problem, flush=True)
