"""Bad input to CKA, the CCA family, shape distances, activations and profiles.

The message says what was given and expected."""
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from visionbench.similarity import CKAMatrix, cca, cka, procrustes, pwcca, similarity_profile, svcca
from visionbench.similarity.activations import activations, capture
from visionbench.similarity.intervals import cka_ceiling, cka_interval

PAIRS = {"cka": cka, "cca": cca, "svcca": svcca, "pwcca": pwcca, "procrustes": procrustes}
each_pair = pytest.mark.parametrize("f", PAIRS.values(), ids=PAIRS)


def says(text, error=ValueError):
    return pytest.raises(error, match=re.escape(text))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@each_pair
def test_shapes(f):
    with says("x: 3 stimuli in (3, 5), expected at least 4"): f(normal(0, 3, 5), normal(1, 3, 5))
    with says("y: 2 stimuli"): f(normal(0, 9, 5), normal(1, 2, 5))
    with says("x (8, 5) and y (9, 5): expected (…,n,p) and (…,n,q) with the same n stimuli"):
        f(normal(0, 8, 5), normal(1, 9, 5))
    with says("x (2, 8, 5) and y (3, 8, 5)"): f(normal(0, 2, 8, 5), normal(1, 3, 8, 5))
    with says("y: torch.float64 (8,) given, expected real numbers"): f(normal(0, 8, 5), normal(1, 8))
    with says("(8, 0) given"): f(normal(0, 8, 5), np.empty((8, 0)))
    with says("torch.complex128"): f(normal(0, 8, 5)*1j, normal(1, 8, 5))


@each_pair
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_errors(f, bad):
    x = normal(0, 3, 10, 4)
    x[1, 2, 3] = bad
    with says("NaN or infinite features, layer 1"): f(x, normal(1, 10, 4))
    with says("NaN or infinite features"): f(normal(1, 10, 4), x[1])
    with says("NaN or infinite features"): f(x[1].astype("float32"), normal(1, 10, 4))


@each_pair
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("constant", [0., .1, -1e4, 1e-30, 12345.678])
def test_a_constant_layer_is_similar_to_nothing_and_named(f, dtype, constant):
    x = normal(0, 3, 12, 50).astype(dtype)
    x[1] = constant
    other = normal(1, 12, 6)
    with pytest.warns(UserWarning, match="x, layer 1: all stimuli give the same features"):
        value = f(x, other)
    assert (value[1] == (pytest.approx(np.pi/2) if f is procrustes else 0) and np.isfinite(value).all()
            and value[0] > -1)
    with pytest.warns(UserWarning, match="y: all stimuli give the same"): assert np.isfinite(f(other, x[1]))
    with pytest.warns(UserWarning): assert np.isfinite(f(x[1], x[1]))


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("debiased", [True, False])
def test_wide_constant_float32_layers_are_found_in_spite_of_rounding(kernel, debiased):
    """The float32 mean of 200 000 equal features is not that number; the layer is constant all the same."""
    x = torch.full((37, 200_000), .1) * torch.linspace(.5, 3, 200_000)
    with pytest.warns(UserWarning, match="x: all stimuli"):
        assert cka(x, normal(0, 37, 3), kernel, debiased) == 0
    x[5:20, 7] += .01
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*all stimuli")
        assert np.isfinite(cka(x, normal(0, 37, 3), kernel)), "a group differs: not constant"


def test_stimuli_that_are_equally_far_apart():
    """One-hot codes hold no structure once the diagonal is left out.

    The biased estimator sees its own diagonal."""
    with pytest.warns(UserWarning, match="x: all stimuli give the same features, or are equally far apart"):
        assert cka(np.eye(10), normal(0, 10, 3)) == 0
    with pytest.warns(UserWarning, match="biased CKA from 10 stimuli"):
        assert cka(np.eye(10), normal(0, 10, 3), debiased=False) > .1


def test_repeated_stimuli_keep_rbf_finite():
    x = np.repeat(normal(0, 3, 4), 5, 0)
    y = np.r_[np.zeros((12, 4)), normal(1, 3, 4)]
    for a, b in ((x, x), (x, y), (y, x)): assert np.isfinite(cka(a, b, "rbf")) and abs(cka(a, b, "rbf")) <= 1
    assert cka(x, x, "rbf") == pytest.approx(1)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18])
def test_extreme_scales_in_float32(scale):
    x, y = normal(0, 20, 6), normal(1, 20, 8)
    y[:, :6] += x
    small = (x*scale).astype("float32")
    for kernel in ("linear", "rbf"): assert abs(cka(small, y, kernel) - cka(x, y, kernel)) < 1e-5
    for f in (svcca, pwcca, procrustes): assert abs(f(small, y) - f(x, y)) < 1e-5


@pytest.mark.parametrize("options,text", [
    (dict(kernel="poly"), "kernel='poly', expected 'linear' or 'rbf'"),
    (dict(sigma=0), "sigma=0, expected above 0"), (dict(kernel="rbf", sigma=-1.), "sigma=-1.0"),
    (dict(sigma=np.nan), "sigma=nan")])
def test_options_of_cka(options, text):
    with says(text): cka(normal(0, 9, 3), normal(1, 9, 3), **options)
    with says(text): CKAMatrix("a", "b", **options).update([normal(0, 9, 3)], [normal(1, 9, 3)])


def test_options_of_the_others():
    x, y = normal(0, 9, 3), normal(1, 9, 3)
    for alpha in (-.1, 1.1, np.nan):
        with says(f"alpha={alpha}, expected 0 (CCA) … 1 (Procrustes)"): procrustes(x, y, alpha)
    for keep in (0, 1.5, np.nan):
        with says(f"keep={keep}, expected a share"): svcca(x, y, keep)
    with says("x: 4 stimuli in (4, 3), expected at least 5"): cka_interval(x[:4], y[:4])
    for trials in (normal(0, 1, 9, 3), normal(0, 9, 3), normal(0, 2, 2, 9, 3)):
        with says("a ceiling needs (R,n,N) with R >= 2 repeats"): cka_ceiling(trials)
    with says("splits=0"): cka_ceiling(normal(0, 4, 9, 3), splits=0)


def test_biased_with_few_samples_warns_and_debiased_does_not():
    x, y = normal(0, 20, 30), normal(1, 20, 40)
    with pytest.warns(UserWarning, match=r"biased CKA from 20 stimuli: "
                      r"unrelated data would give about 0\.6\d .*use debiased=True"):
        cka(x, y, debiased=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cka(x, y)
        (cka(normal(0, 500, 3), normal(1, 500, 4), debiased=False),
         "few features, many stimuli: no bias to speak of")


def test_too_few_stimuli_for_cca_warn():
    with pytest.warns(UserWarning,
                      match="9 canonical correlations are 1 for any data: ranks 9 and 9 with 10 stimuli"):
        assert cca(normal(0, 10, 20), normal(1, 10, 30)) == pytest.approx(1)


# ---- CKAMatrix

def test_batches_of_the_matrix():
    a, b = dict(conv=normal(0, 8, 2, 3, 3), fc=normal(1, 8, 5)), [normal(2, 8, 4)]
    m = CKAMatrix(["conv", "fc"], ["out"])
    with says("no batch yet"): m.compute()
    with says("no batch yet"): m.interval()
    with says("batch_b expected: two networks are compared"): m.update(a)
    with says("batch_a: unknown layer 'fc'. Known: conv."): m.update({"conv": a["conv"]}, b)
    with says("Did you mean 'fcc'? Known: conv, fcc."): m.update({"conv": a["conv"], "fcc": a["fc"]}, b)
    with says("batch_b holds 2 layers, expected 1: ['out']"): m.update(a, b*2)
    with says("batch_a holds 8 images, batch_b 7"): m.update(a, [b[0][:7]])
    with says("batch_a: layers of [8, 6] images"): m.update({"conv": a["conv"], "fc": a["fc"][:6]}, b)
    with says("batch_b 'out': 3 stimuli in (3, 4), expected at least 4"): m.update(a, [b[0][:3]])
    with says("batch_a: NaN or infinite features, layer fc"): m.update({**a, "fc": a["fc"]*np.nan}, b)
    assert m.batches == 0, "a refused batch leaves no trace"
    m.update(a, b)
    assert m.compute().shape == (2, 1) and all(np.isnan(end).all() for end in m.interval())
    with says("a network meets itself"): CKAMatrix(["out"]).update(b, b)
    for names in ([], ["a", "a"]):
        with says("expected names, each once"): CKAMatrix(names)


def test_constant_layers_of_the_matrix_are_named():
    m = CKAMatrix(["alive", "dead"], ["first", "second"])
    for seed in range(3):
        x = normal(seed, 10, 4)
        m.update({"alive": x, "dead": np.full((10, 7), .3)}, {"first": 2*x, "second": np.zeros((10, 2))})
    with pytest.warns(UserWarning) as caught: table = m.compute()
    assert table == pytest.approx(np.array([[1, 0], [0, 0]])) and not np.isnan(m.interval()).any()
    said = " ".join(str(w.message) for w in caught)
    assert "layers_a, layer dead:" in said and "layers_b, layer second:" in said and "alive" not in said


def test_a_layer_that_is_dead_in_one_batch_only():
    m, x = CKAMatrix("a", "b"), normal(0, 3, 10, 4)
    for i, t in enumerate(x): m.update([t*(i != 1)], [t])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0 < m.compute()[0, 0] < 1


# ---- activations

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.fc, self.unused = (nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Linear(16, 3),
                                                      nn.Linear(2, 2))
        self.text = nn.Identity()

    def forward(self, x):
        self.text("no tensor")
        return self.fc(self.relu(self.conv(x)).flatten(1))


def test_layer_names():
    net, x = Net(), torch.rand(6, 1, 4, 4)
    with says("Net: unknown layer 'cnv'. Did you mean 'conv'? Known: conv, fc, relu, text, unused."):
        activations(net, x, "cnv")
    with says("Net: unknown layer 'block*'. Known: conv,"): activations(net, x, ["conv", "block*"])
    with says("layer 'unused' gave no tensor in this pass"): activations(net, x, "unused")
    with says("layer 'relu:1' gave no tensor"): activations(net, x, "relu:1")
    with says("layer 'text' gave no tensor"): activations(net, x, "text")
    with says("unknown layer 'relu:x'"): activations(net, x, "relu:x")
    with says("none of the layers asked for ran"): activations(net, x, "un*")
    with says("layers is empty"): activations(net, x, [])
    with says("ReLU: no inner layer has weights"): activations(nn.ReLU(), x)
    assert (list(activations(net, x, "*")) == ["conv", "relu", "fc"]
            and list(activations(net, x)) == ["conv", "fc"])


def test_images():
    net = Net()
    with says("batch has label, id, expected a tensor under 'image'"): activations(net, {"label": 1, "id": 2})
    with says("images (4,) given, expected (B,…)"): activations(net, torch.rand(4))
    with says("pool='max', expected 'flatten', 'mean', a function or None"):
        activations(net, torch.rand(2, 1, 4, 4), pool="max")


def test_layers_without_a_row_for_each_image():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        def forward(self, x): return self.head(self.inner(x.reshape(-1, 4)).reshape(len(x), -1, 4).mean(1))
    net, x = Windows(), torch.rand(5, 3, 4)
    with says("layer 'inner' gives (15, 4), expected 5 images first"): activations(net, x, "inner")
    with pytest.warns(UserWarning, match="left out, their first axis is not 5 images: inner"):
        assert list(activations(net, x)) == ["head"]


def test_hooks_and_modes_are_put_back_after_an_error():
    net = Net()
    net.fc.eval()
    with pytest.raises(RuntimeError): activations(net, torch.rand(6, 1, 9, 9))
    with pytest.raises(ZeroDivisionError):
        with capture(net, "conv"): 1/0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert net.training and net.conv.training and not net.fc.training


# ---- profiles

def test_arguments_of_a_profile():
    net, x, y = Net(), torch.rand(20, 1, 4, 4), normal(0, 20, 5)
    with says("unknown measure 'rsm'. Did you mean 'rsa'? Known: cca, cka,"):
        similarity_profile(net, y, x, measures="rsm")
    with says("Net: unknown layer 'con'"): similarity_profile(net, y, x, "con")
    with says("Net: unknown layer 'f'"): similarity_profile(net, Net(), x, "fc", "f")
    with says("more images than the 19 responses"): similarity_profile(net, y[:19], x)
    with says("20 images given for 21 responses"): similarity_profile(net, normal(0, 21, 5), x)
    with says("responses: torch.float64 (20,) given"): similarity_profile(net, y[:, 0], x)
    with says("responses (1, 2, 20, 5) given, expected (n,N) or trials (R,n,N)"):
        similarity_profile(net, y[None, None].repeat(2, 1), x)
    with says("no images"): similarity_profile(net, Net(), [])
    with says("no images"): similarity_profile(net, Net(), x[:0])
    with says("'conv': 3 stimuli in (3, 16)"): similarity_profile(net, Net(), x[:3])
    never = y.copy()
    never[:, 2] = np.nan
    with says("NaN or infinite features, layer neurons"):
        similarity_profile(net, never, x, measures="cka")


def test_a_small_last_batch_is_left_out_and_said():
    net = Net()
    with pytest.warns(UserWarning, match="a batch of 2 images is left out of CKA, which needs 4"):
        short = similarity_profile(
            net, net, torch.rand(18, 1, 4, 4, generator=torch.Generator().manual_seed(0)).split(8))
    whole = similarity_profile(
        net, net, torch.rand(18, 1, 4, 4, generator=torch.Generator().manual_seed(0))[:16].split(8))
    assert short.equals(whole)


def test_dead_layers_of_a_profile_are_named():
    net, x = Net(), torch.rand(20, 1, 4, 4)
    nn.init.zeros_(net.fc.weight)
    with pytest.warns(UserWarning, match="first, layer fc: all stimuli give the same"):
        table = similarity_profile(net, normal(0, 20, 5), x, measures="cka")
    assert table.set_index("layer_a").value["fc"] == 0
    with pytest.warns(UserWarning, match="layers_a, layer fc: all stimuli give the same"):
        similarity_profile(net, net, x)
    nn.init.constant_(net.conv.bias, -10)
    with says("rsa of 'relu' by correlation distance: the response to stimulus"):
        similarity_profile(net, normal(0, 20, 5), x, "relu", measures="rsa")
