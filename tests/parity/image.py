"""PSNR and SSIM against scikit-image, torchmetrics and closed forms."""
import numpy as np
import pytest
import torch
from skimage import data
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import peak_signal_noise_ratio as metrics_psnr
from torchmetrics.functional.image import structural_similarity_index_measure

from visionbench.metrics.image import mse, psnr, ssim

SETTINGS = dict(gaussian=dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False),
                uniform={})  # uniform: its defaults


def photographs(kind):
    """Crops of photographs, and the same with noise, blur and a shift; (B,C,H,W) in [0,1]."""
    if kind == "grey":
        x = torch.tensor(data.camera()[100:400, 100:400]).unfold(0, 60, 60).unfold(1, 60, 60).reshape(
            -1, 1, 60, 60)
    else:
        x = torch.tensor(data.astronaut()[:240, 100:340]).unfold(0, 80, 80).unfold(1, 80, 80).reshape(
            -1, 3, 80, 80)
    if kind == "V1 size": x = x[..., ::2, ::2][..., :31, :31]
    x = x.double()/255
    g = torch.Generator().manual_seed(0)
    noisy = (x + .1*torch.randn(x.shape, generator=g, dtype=x.dtype)).clamp(0, 1)
    return (x, torch.cat([noisy[::3], torch.nn.functional.avg_pool2d(x[1::3], 3, 1, 1),
                          x[2::3].roll(2, -1)]), torch.cat([x[::3], x[1::3], x[2::3]]))


@pytest.mark.parametrize("kind", ["grey", "colour", "V1 size"])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_scikit_image(kind, dtype, tolerance):
    _, image, reference = photographs(kind)
    a, b = image.numpy(), reference.numpy()
    each = range(len(a))
    given = image.to(dtype), reference.to(dtype)
    np.testing.assert_allclose(mse(*given), [mean_squared_error(b[i], a[i]) for i in each], atol=tolerance)
    np.testing.assert_allclose(psnr(*given), [peak_signal_noise_ratio(b[i], a[i], data_range=1)
                                              for i in each], atol=10*tolerance)
    for window, options in SETTINGS.items():
        expected = [structural_similarity(b[i], a[i], data_range=1, channel_axis=0, **options) for i in each]
        np.testing.assert_allclose(ssim(*given, window=window), expected, atol=tolerance)
        assert ssim(*given, mean=True, window=window).item() == pytest.approx(np.mean(expected),
                                                                              abs=tolerance)


@pytest.mark.parametrize("kind", ["grey", "colour", "V1 size"])
def test_torchmetrics_without_the_border(kind):
    """Its mean counts windows that hang over the border, its map without those five pixels is the SSIM of
    the paper's code."""
    _, image, reference = photographs(kind)
    whole = structural_similarity_index_measure(image, reference, data_range=1., reduction="none",
                                                return_full_image=True)[1]
    torch.testing.assert_close(ssim(image, reference), whole[..., 5:-5, 5:-5].mean((1, 2, 3)), rtol=0,
                               atol=1e-10)


def test_ssim_window_by_window():
    """The formula of Wang et al. 2004 in a loop over every window of a small image."""
    _, image, reference = photographs("V1 size")
    x, y = image[0, 0, :14, :15].numpy(), reference[0, 0, :14, :15].numpy()
    t = np.arange(-5, 6)
    bell = np.exp(-(t[:, None]**2 + t**2)/(2*1.5**2))
    for window, w, unbiased in (("gaussian", bell/bell.sum(), 1), ("uniform", np.full((7, 7), 1/49), 49/48)):
        values, side = [], len(w)
        for i in range(15 - side):
            for j in range(16 - side):
                a, b = x[i:i + side, j:j + side], y[i:i + side, j:j + side]
                ma, mb = (w*a).sum(), (w*b).sum()
                va, vb, cov = (unbiased*(w*p*q).sum()
                               for p, q in ((a - ma, a - ma), (b - mb, b - mb), (a - ma, b - mb)))
                values.append((2*ma*mb + .01**2)*(2*cov + .03**2)
                              / ((ma**2 + mb**2 + .01**2)*(va + vb + .03**2)))
        got = ssim(torch.tensor(x)[None, None], torch.tensor(y)[None, None], window=window).item()
        assert got == pytest.approx(np.mean(values), abs=1e-12)


def test_torchmetrics_psnr():
    _, image, reference = photographs("colour")
    expected = metrics_psnr(image, reference, data_range=1., reduction="none", dim=(1, 2, 3))
    # theirs takes its logarithm in float32
    torch.testing.assert_close(psnr(image, reference), expected, rtol=1e-6, atol=0)
    assert psnr(image, reference, mean=True) == psnr(image, reference).mean()


@pytest.mark.parametrize("value", [0., .3, 1.])
def test_identical_images(value):
    flat = torch.full((2, 3, 16, 16), value)
    assert ((psnr(flat, flat) == torch.inf).all() and (mse(flat, flat) == 0).all()
            and psnr(flat, flat, mean=True) == torch.inf)
    for window in SETTINGS:
        torch.testing.assert_close(ssim(flat, flat, window=window), torch.ones(2).double(), rtol=0,
                                   atol=1e-10)


def test_one_identical_image_makes_the_mean_infinite():
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = x.clone()
    y[1:] = 1 - y[1:]
    assert psnr(y, x).isinf().tolist() == [True, False, False] and psnr(y, x, mean=True) == torch.inf


@pytest.mark.parametrize("a,b", [(0., 1.), (.5, .6), (0., .01)])
def test_constant_images_have_closed_forms(a, b):
    x, y = (torch.full((1, 1, 12, 12), v, dtype=torch.float64) for v in (a, b))
    assert psnr(x, y).item() == pytest.approx(-20*np.log10(abs(a - b)), abs=1e-9)
    for window in SETTINGS:
        assert ssim(x, y, window=window).item() == pytest.approx((2*a*b + 1e-4)/(a*a + b*b + 1e-4), abs=1e-9)


def test_structure_alone_by_hand():
    """A checkerboard and its negative: same mean .5, same variance, correlation -1."""
    board = (torch.arange(14)[:, None] + torch.arange(14)) % 2
    x = board.double()[None, None]
    i, j = np.mgrid[:7, :7]
    ones = ((i + j) % 2).astype(float)  # one flat window holds 24 or 25 of 49; the negative the other number
    m, v = ones.mean(), ones.var(ddof=1)
    expected = (2*m*(1 - m) + 1e-4)/(m*m + (1 - m)**2 + 1e-4)*(-2*v + 9e-4)/(2*v + 9e-4)
    assert ssim(1 - x, x, window="uniform").item() == pytest.approx(expected, abs=1e-12) and expected < -.99
    assert psnr(1 - x, x) == 0


def test_output_is_clipped_before_it_is_scored():
    _, image, reference = photographs("grey")
    wild = image + 5*(image - .5).clamp_min(.4) - 2
    for score in (mse, psnr, ssim):
        assert torch.equal(score(wild, reference), score(wild.clamp(0, 1), reference))


def test_an_image_is_scored_alone():
    _, image, reference = photographs("V1 size")
    for score in (mse, psnr, ssim):
        each = score(image, reference)
        assert each.shape == (len(image),) and each.dtype == torch.float64
        torch.testing.assert_close(each[-2:], score(image[-2:], reference[-2:]), rtol=1e-12, atol=0)
        torch.testing.assert_close(score(reference, image), each, rtol=1e-12, atol=0)  # symmetric
        assert not score(image.clone().requires_grad_(), reference).isnan().any()
