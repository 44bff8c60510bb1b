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
import joint_darts_faa
from dha import SIGNED, apply_each

# A name in both scripts is the same function (test_copies.py).
AUGMENTATIONS = dha.AUGMENTATIONS | joint_darts_faa.AUGMENTATIONS

NAMES = (
    "AutoContrast Equalize Rotate Posterize Solarize Color Contrast Brightness Sharpness "
    "ShearX ShearY TranslateX TranslateY Identity"
).split()
JOINT = [name for name in NAMES if name != "Identity"] + ["HorizontalFlip", "Invert", "SamplePairing"]
ALL = NAMES + JOINT[-3:]
WITHOUT_MAGNITUDE = ["AutoContrast", "Equalize", "HorizontalFlip", "Invert"]
WITH_MAGNITUDE = [name for name in ALL if name not in WITHOUT_MAGNITUDE]
AFFINE = ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"]
BLENDS = ["Brightness", "Color", "Contrast", "Sharpness"]
KINDS = ["uniform", "low contrast", "constant", "dark", "two levels"]
SIZES = [(1, 1), (2, 5), (32, 32), (31, 17), (17, 31), (224, 224)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def pictures(size, seed=0):
    """One image of each of KINDS: uint8 arrays (H, W, 3)."""
    rng = np.random.default_rng(seed)
    draw = rng.random((*size, 3))
    return [
        (draw * 256).astype(np.uint8),
        (100 + draw * 20).astype(np.uint8),
        np.broadcast_to(np.array([200, 17, 90], np.uint8), (*size, 3)).copy(),
        (draw**4 * 256).astype(np.uint8),
        np.where(draw < 0.9, 30, 220).astype(np.uint8),
    ]


def to_tensor(arrays, dtype=torch.float32):
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous().to(dtype) / 255


def to_levels(images):
    """Float images to what an 8-bit file would hold: int arrays (B, H, W, 3)."""
    return (images * 255).round().to(torch.int64).permute(0, 2, 3, 1).numpy()


def random_magnitude(name, count, seed=0, dtype=torch.float32):
    m = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return m * 2 - 1 if name in SIGNED else m


def test_names_and_signs():
    assert sorted(dha.AUGMENTATIONS) == sorted(NAMES)
    assert sorted(joint_darts_faa.AUGMENTATIONS) == sorted(JOINT)
    assert SIGNED == {*AFFINE, *BLENDS}


# ---------------------------------------------------------------------------------------------------------------
# PIL and torchvision
# ---------------------------------------------------------------------------------------------------------------

PIL_EXACT = {
    "Posterize": lambda image, m: ImageOps.posterize(image, 8 - round(4 * m)),
    "Solarize": lambda image, m: ImageOps.solarize(image, round(255 * (1 - m), 6) if m else 256),
    "AutoContrast": lambda image, m: ImageOps.autocontrast(image),
    "Equalize": lambda image, m: ImageOps.equalize(image),
    "Invert": lambda image, m: ImageOps.invert(image),
    "HorizontalFlip": lambda image, m: ImageOps.mirror(image),
}
# 0.2 and 0.6 put the threshold of Solarize on a level of the image.
EXACT_MAGNITUDES = [0.0, 0.05, 0.2, 0.3, 0.45, 0.6, 0.77, 0.9, 1.0]
PIL_BLEND = {
    "Brightness": ImageEnhance.Brightness,
    "Color": ImageEnhance.Color,
    "Contrast": ImageEnhance.Contrast,
    "Sharpness": ImageEnhance.Sharpness,
}
BLEND_MAGNITUDES = [-1.0, -0.6, -0.1, 0.0, 0.15, 0.5, 1.0]


def batch_of_all(size, magnitudes):
    """Every kind of image with every magnitude, as one batch: arrays, magnitudes as numbers."""
    arrays = [array for array in pictures(size) for _ in magnitudes]
    return arrays, magnitudes * len(KINDS)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", PIL_EXACT)
def test_equals_pil(name, size):
    arrays, magnitudes = batch_of_all(size, EXACT_MAGNITUDES if name in WITH_MAGNITUDE else [0.0])
    got = to_levels(AUGMENTATIONS[name](to_tensor(arrays), torch.tensor(magnitudes)))
    for array, m, levels in zip(arrays, magnitudes, got):
        want = np.asarray(PIL_EXACT[name](Image.fromarray(array), m))
        assert np.array_equal(levels, want), (m, np.abs(levels - want).max())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", BLENDS)
def test_blends_are_within_one_level_of_pil(name, size):
    arrays, magnitudes = batch_of_all(size, BLEND_MAGNITUDES)
    got = to_levels(AUGMENTATIONS[name](to_tensor(arrays), torch.tensor(magnitudes)))
    for array, m, levels in zip(arrays, magnitudes, got):
        want = np.asarray(PIL_BLEND[name](Image.fromarray(array)).enhance(1 + 0.9 * m)).astype(int)
        assert np.abs(levels - want).max() <= 1, m


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sample_pairing_is_a_blend_with_the_next_image(size):
    arrays, magnitudes = batch_of_all(size, [0.0, 0.2, 0.7, 1.0])
    got = to_levels(AUGMENTATIONS["SamplePairing"](to_tensor(arrays), torch.tensor(magnitudes)))
    for i, (array, m, levels) in enumerate(zip(arrays, magnitudes, got)):
        other = Image.fromarray(arrays[(i + 1) % len(arrays)])
        want = np.asarray(Image.blend(Image.fromarray(array), other, 0.4 * m)).astype(int)
        assert np.abs(levels - want).max() <= 1, m


def shrink(mask):
    """Without the pixels that touch one outside the mask, or the edge of the image. (H, W) bool."""
    padded = np.pad(mask, 1)
    H, W = mask.shape
    return np.all([padded[i : i + H, j : j + W] for i in range(3) for j in range(3)], axis=0)


@pytest.mark.parametrize("size", [(32, 32), (31, 17), (17, 31), (224, 224)], ids=str)
@pytest.mark.parametrize("name", AFFINE)
def test_affine_equals_torchvision_inside_and_is_zero_outside(name, size):
    """Within a pixel of the image's outline PIL repeats the last pixel where ours fades to 0, so that is left out.

    Which pixels those are is read off PIL's own picture of a white image, and not off the function under test.
    """
    if name.startswith("Translate"):
        side = size[1] if name == "TranslateX" else size[0]
        values = [-int(0.45 * side), -3, 1, 4, int(0.45 * side)]
        magnitudes = [k / (0.45 * side) for k in values]
    else:
        magnitudes = [-1.0, -0.37, 0.11, 0.64, 1.0]
        values = [m * (30 if name == "Rotate" else 0.3) for m in magnitudes]
    arrays = pictures(size)
    got = AUGMENTATIONS[name](to_tensor(arrays), torch.tensor(magnitudes)).permute(0, 2, 3, 1).numpy() * 255
    for array, value, levels in zip(arrays, values, got):

        def oracle(picture):
            return np.asarray(_apply_op(Image.fromarray(picture), name, value, InterpolationMode.BILINEAR, None))

        want, white = oracle(array).astype(float), oracle(np.full_like(array, 255))[..., 0]
        inside, outside = shrink(white == 255), shrink(white == 0)
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
    ys, xs = torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="ij")
    x, y = (out * xs).sum() / out.sum(), (out * ys).sum() / out.sum()
    turn = math.radians(15)
    expected = {
        "ShearX": (14 - 0.15 * 4.5, 4),
        "ShearY": (14, 4 - 0.15 * 14.5),
        "TranslateX": (14 + 4.5, 4),
        "TranslateY": (14, 4 + 4.5),
        "Rotate": (
            9.5 + 4.5 * math.cos(turn) - 5.5 * math.sin(turn),
            9.5 - (4.5 * math.sin(turn) + 5.5 * math.cos(turn)),
        ),
    }[name]
    assert (x.item(), y.item()) == pytest.approx(expected, abs=0.12)


# ---------------------------------------------------------------------------------------------------------------
# What holds for every operation
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL[:-1])
def test_each_image_has_its_own_magnitude(name):
    images = torch.cat([to_tensor(pictures((19, 23))), torch.rand(3, 3, 19, 23)])
    magnitude = random_magnitude(name, len(images), seed=3)
    one_by_one = [AUGMENTATIONS[name](images[i : i + 1], magnitude[i : i + 1]) for i in range(len(images))]
    together = AUGMENTATIONS[name](images, magnitude)
    torch.testing.assert_close(together, torch.cat(one_by_one), rtol=0, atol=2e-6)
    if name in WITH_MAGNITUDE and name != "Identity":  # the magnitudes did something
        assert not torch.equal(together, AUGMENTATIONS[name](images, magnitude.flip(0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", WITH_MAGNITUDE)
def test_magnitude_zero_is_the_identity(name, size, dtype):
    on_grid = to_tensor(pictures(size), dtype)
    off_grid = torch.rand(3, 3, *size, dtype=dtype, generator=torch.Generator().manual_seed(0))
    images = torch.cat([on_grid, off_grid])
    out = AUGMENTATIONS[name](images, torch.zeros(len(images), dtype=dtype))
    # The affine ones scale coordinates to [-1, 1] and back, which rounds them by a few units in the last place.
    rounding = 4 * torch.finfo(dtype).eps * max(size) if name in AFFINE else 0
    torch.testing.assert_close(out, images, rtol=0, atol=max(1e-6, rounding) if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (13, 10)], ids=str)
def test_range_shape_dtype_and_no_side_effects(name, size, dtype):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(12, 3, *size, dtype=dtype, generator=generator)
    images[0], images[1] = 0, 1
    images[2:5] = images[2:5].round()
    for extreme in (None, 0.0, 1.0, -1.0):
        magnitude = random_magnitude(name, 12, dtype=dtype)
        if extreme is not None:
            magnitude = torch.full_like(magnitude, extreme if name in SIGNED else abs(extreme))
        before = images.clone(), magnitude.clone()
        out = AUGMENTATIONS[name](images, magnitude)
        assert out.shape == images.shape and out.dtype == dtype
        assert out.min() >= 0 and out.max() <= 1
        assert torch.equal(images, before[0]) and torch.equal(magnitude, before[1])
        assert out.untyped_storage().data_ptr() != images.untyped_storage().data_ptr()


@pytest.mark.parametrize("layout", ["channels_last", "expanded", "strided"])
@pytest.mark.parametrize("name", ALL)
def test_memory_layout_does_not_matter(name, layout):
    images = torch.rand(4, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    images = {
        "channels_last": images.contiguous(memory_format=torch.channels_last),
        "expanded": images[:1].expand(4, -1, -1, -1),
        "strided": images[:, :, :, ::2],
    }[layout]
    magnitude = random_magnitude(name, 4)
    out = AUGMENTATIONS[name](images, magnitude)
    torch.testing.assert_close(out, AUGMENTATIONS[name](images.contiguous(), magnitude), rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AFFINE + BLENDS + ["SamplePairing"])
def test_gradients_equal_finite_differences(name):
    """Away from kinks: no value is clamped, no point of the affine ones lies on a pixel centre."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 5, 4, dtype=torch.float64, generator=generator) * 0.4 + 0.3
    magnitude = torch.tensor([0.37, -0.61] if name in AFFINE else [0.13, -0.21], dtype=torch.float64)
    inputs = (images.requires_grad_(), magnitude.requires_grad_())
    # Sharpness along random directions: its convolution starts threads, which takes long on a busy machine.
    assert torch.autograd.gradcheck(AUGMENTATIONS[name], inputs, fast_mode=name == "Sharpness")


def gradients(name, images, magnitude, upstream):
    images, magnitude = images.clone().requires_grad_(), magnitude.clone().requires_grad_()
    out = AUGMENTATIONS[name](images, magnitude)
    return torch.autograd.grad(out, (images, magnitude), upstream, allow_unused=True)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.cat([to_tensor(pictures((9, 7))), torch.rand(3, 3, 9, 7, generator=generator)])
    upstream = torch.randn(images.shape, generator=generator)
    return images, torch.linspace(0, 1, len(images)), upstream


@pytest.mark.parametrize("name", ["AutoContrast", "Equalize", "Posterize", "Identity"])
def test_image_gradient_is_that_of_the_identity(name, batch):
    images, magnitude, upstream = batch
    assert torch.equal(gradients(name, images, magnitude, upstream)[0], upstream)


@pytest.mark.parametrize("name", [*WITHOUT_MAGNITUDE, "Identity"])
def test_no_gradient_for_a_magnitude_without_effect(name, batch):
    gradient = gradients(name, *batch)[1]
    assert gradient is None or not gradient.any()


@pytest.mark.parametrize("name", ["Solarize", "Posterize"])
def test_magnitude_gradient_is_straight_through(name, batch):
    images, magnitude, upstream = batch
    torch.testing.assert_close(gradients(name, images, magnitude, upstream)[1], upstream.sum((1, 2, 3)))


def test_solarize_image_gradient_has_the_sign_of_the_pixel(batch):
    images, magnitude, upstream = batch
    magnitude = magnitude + 0.001  # off the levels of the image
    inverted = images >= 1 - magnitude.view(-1, 1, 1, 1)
    assert inverted.any() and not inverted.all()
    want = torch.where(inverted, -upstream, upstream)
    assert torch.equal(gradients("Solarize", images, magnitude, upstream)[0], want)


# ---------------------------------------------------------------------------------------------------------------
# A batch in which every image has its own operation
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_apply_each_is_the_named_operation_on_each_image(device):
    generator = torch.Generator().manual_seed(0)
    names = list(dha.AUGMENTATIONS)
    choice = (torch.arange(3 * 14) % 14)[torch.randperm(3 * 14, generator=generator)]
    images = torch.rand(len(choice), 3, 16, 11, generator=generator)
    magnitude = torch.rand(len(choice), generator=generator)
    signed = torch.tensor([names[k] in SIGNED for k in choice])
    magnitude = torch.where(signed & (torch.rand(len(choice), generator=generator) < 0.5), -magnitude, magnitude)
    images, choice, magnitude = images.to(device), choice.to(device), magnitude.to(device)
    before = images.clone()
    out = apply_each(images, choice, magnitude)
    assert torch.equal(images, before)
    for i, k in enumerate(choice.tolist()):
        want = AUGMENTATIONS[names[k]](images[i : i + 1], magnitude[i : i + 1])[0]
        torch.testing.assert_close(out[i], want, rtol=0, atol=2e-6, msg=lambda text: f"{names[k]}: {text}")


def test_apply_each_on_few_images():
    """One image, and a batch in which only one operation occurs: the others have nothing to do."""
    for count, k in ((1, 3), (5, 8)):
        images, magnitude = torch.rand(count, 3, 8, 8), torch.full((count,), 0.7)
        out = apply_each(images, torch.full((count,), k), magnitude)
        assert torch.equal(out, dha.AUGMENTATIONS[list(dha.AUGMENTATIONS)[k]](images, magnitude))


def test_smoothing_kernel_of_sharpness_is_written_out():
    """PIL rounds the smoothed image; in floats the blend with factor 0.1 is 0.1 image + 0.9 smoothed inside."""
    images = torch.rand(1, 3, 6, 5, dtype=torch.float64) * 0.5 + 0.25
    weights = torch.tensor([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=torch.float64) / 13
    smoothed = F.conv2d(images.transpose(0, 1), weights.view(1, 1, 3, 3)).transpose(0, 1)
    want = images.clone()
    want[:, :, 1:-1, 1:-1] = 0.1 * images[:, :, 1:-1, 1:-1] + 0.9 * smoothed
    out = AUGMENTATIONS["Sharpness"](images, torch.tensor([-1.0], dtype=torch.float64))
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
