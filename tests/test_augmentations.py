"""The batched augmentations against PIL, torchvision, finite differences and their own definition."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import _apply_op

import dha
import joint_darts_faa as joint
from conftest import needs_a_gpu
from dha import SIGNED

AUGMENTATIONS = dha.AUGMENTATIONS | joint.AUGMENTATIONS  # joint's add gradients to some: see the last part
AFFINE = ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"]
BLENDS = ["Brightness", "Color", "Contrast", "Sharpness"]
WITHOUT_MAGNITUDE = ["AutoContrast", "Equalize", "HorizontalFlip", "Invert"]
WITH_MAGNITUDE = [*AFFINE, *BLENDS, "Solarize", "Posterize", "SamplePairing", "Identity"]
ALL = WITHOUT_MAGNITUDE + WITH_MAGNITUDE
SIZES = [(1, 1), (2, 5), (32, 32), (31, 17), (17, 31), (224, 224)]
GPU = pytest.param("cuda", marks=needs_a_gpu)


def pictures(size, seed=0):
    """Uniform, of low contrast, constant, dark, of two levels: uint8 arrays (H, W, 3)."""
    rng = np.random.default_rng(seed)
    draw = rng.random((*size, 3))
    constant = np.broadcast_to(np.array([200, 17, 90]), draw.shape)
    kinds = [draw * 256, 100 + draw * 20, constant, draw**4 * 256, np.where(draw < 0.9, 30, 220)]
    return [kind.astype(np.uint8) for kind in kinds]


def to_tensor(arrays, dtype=torch.float32):
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous().to(dtype) / 255


def to_levels(images):
    """Float images to what an 8-bit file would hold: int arrays (B, H, W, 3)."""
    return (images * 255).round().to(torch.int64).permute(0, 2, 3, 1).numpy()


def uniform(*shape, dtype=torch.float32, seed=0):
    return torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def random_magnitude(name, count, seed=0, dtype=torch.float32):
    m = uniform(count, seed=seed, dtype=dtype)
    return m * 2 - 1 if name in SIGNED else m


def test_names_and_signs():
    rest = {"AutoContrast", "Equalize", "Posterize", "Solarize"}
    assert set(dha.AUGMENTATIONS) == {*AFFINE, *BLENDS, *rest, "Identity"} and len(dha.AUGMENTATIONS) == 14
    assert set(joint.AUGMENTATIONS) == {*AFFINE, *BLENDS, *rest, "HorizontalFlip", "Invert", "SamplePairing"}
    assert SIGNED == joint.SIGNED == {*AFFINE, *BLENDS} and set(ALL) == set(AUGMENTATIONS)


@pytest.mark.parametrize("name", [name for name in dha.AUGMENTATIONS if name in joint.AUGMENTATIONS])
def test_added_gradients_change_no_result(name):
    """An operation that has none of its own is the same in both scripts, but for its gradient."""
    for size in SIZES[:4]:
        images = torch.cat([to_tensor(pictures(size)), uniform(3, 3, *size)])
        magnitude = random_magnitude(name, len(images))
        results = [script.AUGMENTATIONS[name](images, magnitude) for script in (dha, joint)]
        assert torch.equal(*results)


# -------- PIL and torchvision -------------------------------------------------------------------------------

PIL_EXACT = {
    "Posterize": lambda image, m: ImageOps.posterize(image, 8 - round(4 * m)),
    "Solarize": lambda image, m: ImageOps.solarize(image, round(255 * (1 - m), 6) if m else 256),
    "AutoContrast": lambda image, m: ImageOps.autocontrast(image),
    "Equalize": lambda image, m: ImageOps.equalize(image),
    "Invert": lambda image, m: ImageOps.invert(image),
    "HorizontalFlip": lambda image, m: ImageOps.mirror(image),
}


def each(name, size, magnitudes):
    """Of every picture with every magnitude: the array, the magnitude, the result's levels."""
    arrays = [array for array in pictures(size) for _ in magnitudes]
    magnitudes = magnitudes * 5
    got = to_levels(AUGMENTATIONS[name](to_tensor(arrays), torch.tensor(magnitudes)))
    return zip(arrays, magnitudes, got, strict=True)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", PIL_EXACT)
def test_equals_pil(name, size):
    # 0.2 and 0.6 put the threshold of Solarize on a level of the image
    magnitudes = [0.0, 0.05, 0.2, 0.3, 0.45, 0.6, 0.77, 0.9, 1.0] if name in WITH_MAGNITUDE else [0.0]
    for array, m, levels in each(name, size, magnitudes):
        want = np.asarray(PIL_EXACT[name](Image.fromarray(array), m))
        assert np.array_equal(levels, want), (m, np.abs(levels - want).max())


def test_auto_contrast_equals_pil_for_every_darkest_and_brightest_level():
    """All pairs low <= high, three an image of 1 x 256 pixels, which hold every level between."""
    low, high = np.triu_indices(256)  # 32,896 pairs
    low, high = (np.append(side, side[-2:]) for side in (low, high))  # a multiple of 3
    levels = np.arange(256)
    between = levels.clip(low[:, None], high[:, None])
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = 255.0 / (high - low)[:, None]
        want = np.trunc(between * scale - low[:, None] * scale).clip(0, 255)  # as ImageOps.autocontrast
    want = np.where((high > low)[:, None], want, between).astype(int)
    for pair in np.random.default_rng(0).choice(len(low), 300, replace=False):  # and so it is
        picture = Image.fromarray(between[pair : pair + 1].astype(np.uint8))
        assert np.array_equal(np.asarray(ImageOps.autocontrast(picture))[0], want[pair])
    got = []
    for images in torch.from_numpy(between).view(-1, 3, 1, 256).split(2000):
        got.append((joint.auto_contrast(images.float() / 255, torch.zeros(len(images))) * 255).round().int())
    assert np.array_equal(torch.cat(got).view(-1, 256).numpy(), want)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", BLENDS)
def test_blends_are_within_one_level_of_pil(name, size):
    for array, m, levels in each(name, size, [-1.0, -0.6, -0.1, 0.0, 0.15, 0.5, 1.0]):
        want = getattr(ImageEnhance, name)(Image.fromarray(array)).enhance(1 + 0.9 * m)
        assert np.abs(levels - np.asarray(want).astype(int)).max() <= 1, m


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sample_pairing_is_a_blend_with_the_next_image(size):
    arrays, magnitudes, got = zip(*each("SamplePairing", size, [0.0, 0.2, 0.7, 1.0]))
    for array, other, m, levels in zip(arrays, arrays[1:] + arrays[:1], magnitudes, got):
        want = Image.blend(Image.fromarray(array), Image.fromarray(other), 0.4 * m)
        assert np.abs(levels - np.asarray(want).astype(int)).max() <= 1, m


def test_smoothing_of_sharpness_is_written_out():
    """PIL rounds the smoothed image; in floats, factor 0.1 gives 0.1 image + 0.9 smoothed inside."""
    images = uniform(1, 3, 6, 5, dtype=torch.float64) * 0.5 + 0.25
    kernel = torch.tensor([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=torch.float64).view(1, 1, 3, 3) / 13
    smoothed = F.conv2d(images.transpose(0, 1), kernel).transpose(0, 1)
    want = images.clone()
    want[:, :, 1:-1, 1:-1] = 0.1 * images[:, :, 1:-1, 1:-1] + 0.9 * smoothed
    out = dha.sharpness(images, torch.tensor([-1.0], dtype=torch.float64))
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)


def transformed(array, name, value):
    image = _apply_op(Image.fromarray(array), name, value, InterpolationMode.BILINEAR, None)
    return np.asarray(image).astype(float)


def shrink(mask):
    """Without the pixels that touch one outside the mask, or the edge of the image. (H, W) bool."""
    padded, (H, W) = np.pad(mask, 1), mask.shape
    return np.all([padded[i : i + H, j : j + W] for i in range(3) for j in range(3)], axis=0)


@pytest.mark.parametrize("size", SIZES[2:], ids=str)
@pytest.mark.parametrize("name", AFFINE)
def test_affine_equals_torchvision_inside_and_is_zero_outside(name, size):
    """Within a pixel of the outline PIL repeats the last pixel where ours fades to 0: that is left out.
    Which pixels those are is read off PIL's own picture of a white image, not off what is tested."""
    if name.startswith("Translate"):
        reach = 0.45 * size[name == "TranslateX"]
        values = [-int(reach), -3, 1, 4, int(reach)]
        magnitudes = [k / reach for k in values]
    else:
        magnitudes = [-1.0, -0.37, 0.11, 0.64, 1.0]
        values = [m * (30 if name == "Rotate" else 0.3) for m in magnitudes]
    arrays = pictures(size)
    got = AUGMENTATIONS[name](to_tensor(arrays), torch.tensor(magnitudes)).permute(0, 2, 3, 1).numpy() * 255
    for array, value, levels in zip(arrays, values, got):
        want, white = (transformed(x, name, value) for x in (array, np.full_like(array, 255)))
        inside, outside = shrink(white[..., 0] == 255), shrink(white[..., 0] == 0)
        assert inside.mean() > 0.3
        assert np.abs(levels - want)[inside].max() <= 2, value
        assert (levels[outside] == 0).all(), value
        if name.startswith("Translate"):  # whole pixels: the outline is sharp
            assert np.abs(levels - want).max() <= 1


@pytest.mark.parametrize("name", AFFINE)
def test_affine_directions(name):
    """Which way a positive magnitude moves a dot, written out."""
    images = torch.zeros(1, 3, 20, 20)
    images[:, :, 4, 14] = 1  # (x, y) = (14, 4); from the centre at (9.5, 9.5): 4.5 right, 5.5 up
    out = AUGMENTATIONS[name](images, torch.tensor([0.5]))[0, 0]
    x, y = ((out * torch.arange(20.0).view(shape)).sum() / out.sum() for shape in ((1, 20), (20, 1)))
    sin, cos = math.sin(math.radians(15)), math.cos(math.radians(15))
    expected = {
        "ShearX": (14 - 0.15 * 4.5, 4),
        "ShearY": (14, 4 - 0.15 * 14.5),
        "TranslateX": (14 + 4.5, 4),
        "TranslateY": (14, 4 + 4.5),
        "Rotate": (9.5 + 4.5 * cos - 5.5 * sin, 9.5 - (4.5 * sin + 5.5 * cos)),
    }
    assert (x.item(), y.item()) == pytest.approx(expected[name], abs=0.12)


# -------- What holds for every operation --------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ALL if name != "SamplePairing"])
def test_each_image_has_its_own_magnitude(name):
    images = torch.cat([to_tensor(pictures((19, 23))), uniform(3, 3, 19, 23)])
    magnitude = random_magnitude(name, len(images), seed=3)
    alone = [AUGMENTATIONS[name](images[i : i + 1], magnitude[i : i + 1]) for i in range(len(images))]
    together = AUGMENTATIONS[name](images, magnitude)
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=2e-6)
    if name in WITH_MAGNITUDE[:-1]:  # the magnitudes did something
        assert not torch.equal(together, AUGMENTATIONS[name](images, magnitude.flip(0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", WITH_MAGNITUDE)
def test_magnitude_zero_is_the_identity(name, dtype):
    for size in SIZES:
        images = torch.cat([to_tensor(pictures(size), dtype), uniform(3, 3, *size, dtype=dtype)])
        out = AUGMENTATIONS[name](images, torch.zeros(len(images), dtype=dtype))
        # the affine ones scale coordinates to [-1, 1] and back: a few units in the last place
        rounding = 4 * torch.finfo(dtype).eps * max(size) if name in AFFINE else 0
        atol = max(1e-6, rounding) if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(out, images, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_range_shape_dtype_and_no_side_effects(name, dtype):
    for size in ((1, 1), (2, 3), (13, 10)):
        images = uniform(12, 3, *size, dtype=dtype)
        images[0], images[1], images[2:5] = 0, 1, images[2:5].round()
        for factor in (None, 0.0, 1.0, -1.0):
            magnitude = random_magnitude(name, 12, dtype=dtype)
            if factor is not None:
                magnitude = torch.full_like(magnitude, factor if name in SIGNED else abs(factor))
            before = images.clone(), magnitude.clone()
            out = AUGMENTATIONS[name](images, magnitude)
            assert out.shape == images.shape and out.dtype == dtype and 0 <= out.min() and out.max() <= 1
            assert torch.equal(images, before[0]) and torch.equal(magnitude, before[1])
            assert out.untyped_storage().data_ptr() != images.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", ALL)
def test_gray_images_may_have_one_channel(name):
    images, magnitude = uniform(4, 1, 9, 7), random_magnitude(name, 4)
    out = AUGMENTATIONS[name](images, magnitude)
    want = AUGMENTATIONS[name](images.expand(-1, 3, -1, -1), magnitude)
    torch.testing.assert_close(out, want[:, :1], rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ALL)
def test_memory_layout_does_not_matter(name):
    images, magnitude = uniform(4, 3, 8, 6), random_magnitude(name, 4)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    for x in (channels_last, images[:1].expand(4, -1, -1, -1), images[:, :, :, ::2]):
        want = AUGMENTATIONS[name](x.contiguous(), magnitude)
        torch.testing.assert_close(AUGMENTATIONS[name](x, magnitude), want, rtol=0, atol=1e-6)


# -------- Gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*AFFINE, *BLENDS, "SamplePairing"])
def test_gradients_equal_finite_differences(name):
    """Away from kinks: no value is clamped, no point of the affine ones lies on a pixel centre."""
    images = uniform(2, 3, 5, 4, dtype=torch.float64) * 0.4 + 0.3
    magnitude = torch.tensor([0.37, -0.61] if name in AFFINE else [0.13, -0.21], dtype=torch.float64)
    inputs = images.requires_grad_(), magnitude.requires_grad_()
    assert torch.autograd.gradcheck(AUGMENTATIONS[name], inputs)


def gradients(name, images, magnitude, upstream):
    """The gradients of images and magnitude; zeros where there is none."""
    images, magnitude = images.clone().requires_grad_(), magnitude.clone().requires_grad_()
    out = AUGMENTATIONS[name](images, magnitude)
    found = torch.autograd.grad(out, (images, magnitude), upstream, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip((images, magnitude), found)]


@pytest.fixture
def batch():
    images = torch.cat([to_tensor(pictures((9, 7))), uniform(3, 3, 9, 7)])
    return images, torch.linspace(0, 1, len(images)), uniform(*images.shape, seed=1) * 2 - 1


@pytest.mark.parametrize("name", ["AutoContrast", "Equalize", "Posterize", "Identity"])
def test_image_gradient_is_that_of_the_identity(name, batch):
    assert torch.equal(gradients(name, *batch)[0], batch[2])


@pytest.mark.parametrize("name", [*WITHOUT_MAGNITUDE, "Identity"])
def test_no_gradient_for_a_magnitude_without_effect(name, batch):
    assert not gradients(name, *batch)[1].any()


@pytest.mark.parametrize("name", ["Solarize", "Posterize"])
def test_straight_through_gradient_of_the_magnitude_is_minus_one(name, batch):
    """Faster AutoAugment's rule is +1 for the threshold and for the bits kept: both fall as m rises."""
    want = -batch[2].sum((1, 2, 3))
    torch.testing.assert_close(gradients(name, *batch)[1], want)


def test_solarize_image_gradient_has_the_sign_of_the_pixel(batch):
    images, magnitude, upstream = batch
    magnitude = magnitude + 0.001  # off the levels of the image
    inverted = images >= 1 - magnitude.view(-1, 1, 1, 1)
    assert inverted.any() and not inverted.all()
    want = torch.where(inverted, -upstream, upstream)
    assert torch.equal(gradients("Solarize", images, magnitude, upstream)[0], want)


@pytest.mark.parametrize("name", [*AFFINE, *BLENDS])
def test_pixels_at_the_ends_of_the_range_keep_their_gradient(name):
    """As in black padding. torch.clamp's gradient is 0 there from 2.14 on, and was 1 before."""
    images, upstream = uniform(4, 3, 6, 6).round(), uniform(4, 3, 6, 6, seed=1)
    got = gradients(name, images, torch.zeros(4), upstream)
    torch.testing.assert_close(got[0], upstream, rtol=0, atol=1e-5)
    assert got[1].abs().min() > 0
    black = gradients(name, torch.zeros_like(images), torch.zeros(4), upstream)[0]
    torch.testing.assert_close(black, upstream, rtol=0, atol=1e-5)


# -------- A batch in which every image has its own operation, or none ---------------------------------------


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("script", [dha, joint], ids=["dha", "joint"])
def test_apply_each_is_the_named_operation_on_each_image(script, device):
    names = list(script.AUGMENTATIONS)
    choice = uniform(4, len(names) + 2).argsort(1).flatten() - 1  # each four times; -1 and N: none
    images, magnitude = uniform(len(choice), 3, 16, 11), uniform(len(choice), seed=1) * 2 - 1
    images, choice, magnitude = images.to(device), choice.to(device), magnitude.to(device)
    before = images.clone()
    out = script.apply_each(images, choice, magnitude)
    assert torch.equal(images, before)
    for i, k in enumerate(choice.tolist()):
        if k not in range(len(names)):
            assert torch.equal(out[i], images[i])
            continue
        few = [i, (i + 1) % len(images)]  # the next one too, which SamplePairing wants
        m = magnitude[few] if names[k] in SIGNED else magnitude[few].abs()  # the others never see a sign
        want = AUGMENTATIONS[names[k]](images[few], m)[0]
        torch.testing.assert_close(out[i], want, rtol=0, atol=2e-6, msg=names[k])


def test_apply_each_on_few_images():
    """One image, and a batch in which only one operation occurs."""
    for count, k in ((1, 3), (5, 8)):
        images, magnitude = uniform(count, 3, 8, 8), torch.full((count,), 0.7)
        want = list(dha.AUGMENTATIONS.values())[k](images, magnitude)
        assert torch.equal(dha.apply_each(images, torch.full((count,), k), magnitude), want)
        for none in (-1, 14, 99):
            assert torch.equal(dha.apply_each(images, torch.full((count,), none), magnitude), images)
