"""The batched image operations. Oracles: PIL, torchvision, float64 finite differences, definitions written out."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import _apply_op

import dha
import joint_darts_faa as joint
from conftest import needs_a_gpu
from dha import SIGNED

AUGMENTATIONS = joint.AUGMENTATIONS | dha.AUGMENTATIONS  # what an image becomes is the same in both, see below
WITH_GRADIENTS = dha.AUGMENTATIONS | joint.AUGMENTATIONS  # joint's
AFFINE = ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"]
BLENDS = ["Brightness", "Color", "Contrast", "Sharpness"]
WITHOUT_MAGNITUDE = ["AutoContrast", "Equalize", "HorizontalFlip", "Invert"]
WITH_MAGNITUDE = [*AFFINE, *BLENDS, "Solarize", "Posterize", "SamplePairing", "Identity"]
ALL = WITHOUT_MAGNITUDE + WITH_MAGNITUDE
SIZES = [(1, 1), (2, 5), (32, 32), (31, 17), (48, 80)]
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


def uniform(*shape, dtype=torch.float32, seed=0):
    return torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def mixed(size, dtype=torch.float32):
    """Five pictures, and three images that are not on the 8-bit grid."""
    return torch.cat([to_tensor(pictures(size), dtype), uniform(3, 3, *size, dtype=dtype)])


def random_magnitude(name, count, seed=0, dtype=torch.float32):
    m = uniform(count, seed=seed, dtype=dtype)
    return m * 2 - 1 if name in SIGNED else m


def test_names_and_signs():
    rest = {"AutoContrast", "Equalize", "Posterize", "Solarize"}
    assert set(dha.AUGMENTATIONS) == {*AFFINE, *BLENDS, *rest, "Identity"} and len(dha.AUGMENTATIONS) == 14
    assert set(joint.AUGMENTATIONS) == {*AFFINE, *BLENDS, *rest, "HorizontalFlip", "Invert", "SamplePairing"}
    assert SIGNED == joint.SIGNED == {*AFFINE, *BLENDS} and set(ALL) == set(AUGMENTATIONS)


# -------- PIL and torchvision ----------------------------------------------------------------------------------------

PIL_EXACT = {
    "Posterize": lambda image, m: ImageOps.posterize(image, 8 - round(4 * m)),
    "Solarize": lambda image, m: ImageOps.solarize(image, round(255 * (1 - m), 6) if m else 256),
    "AutoContrast": lambda image, m: ImageOps.autocontrast(image),
    "Equalize": lambda image, m: ImageOps.equalize(image),
    "Invert": lambda image, m: ImageOps.invert(image),
    "HorizontalFlip": lambda image, m: ImageOps.mirror(image),
}


def each(name, size, magnitudes):
    """Of every picture with every magnitude: the array, the magnitude, the result as an 8-bit file would hold it."""
    arrays = [array for array in pictures(size) for _ in magnitudes]
    magnitudes = magnitudes * 5
    low = -1.0 if name in SIGNED else 0.0
    out = AUGMENTATIONS[name](to_tensor(arrays), torch.tensor(magnitudes).clamp(min=low))
    levels = (out * 255).round().to(torch.int64).permute(0, 2, 3, 1).numpy()
    return zip(arrays, magnitudes, levels, strict=True)


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
    pairs = torch.triu_indices(256, 256)  # 32,896 of them
    low, high = torch.cat([pairs, pairs[:, -2:]], 1).unsqueeze(2)  # a multiple of 3
    images = torch.arange(256).clamp(low, high).view(-1, 3, 1, 256)
    for x in images.split(2000):
        out = dha.auto_contrast(x / 255, torch.zeros(len(x)))
        pictures, levels = (t.to(torch.uint8).permute(0, 2, 3, 1).numpy() for t in (x, (out * 255).round()))
        for picture, found in zip(pictures, levels):
            assert np.array_equal(np.asarray(ImageOps.autocontrast(Image.fromarray(picture))), found)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", [*BLENDS, "SamplePairing"])
def test_blends_are_within_one_level_of_pil(name, size):
    """SamplePairing: a blend with the next image."""
    arrays, magnitudes, got = zip(*each(name, size, [-1.0, -0.6, -0.1, 0.0, 0.15, 0.5, 1.0]))
    for array, following, m, levels in zip(arrays, arrays[1:] + arrays[:1], magnitudes, got):
        image = Image.fromarray(array)
        if name == "SamplePairing":
            want = Image.blend(image, Image.fromarray(following), 0.4 * max(m, 0.0))
        else:
            want = getattr(ImageEnhance, name)(image).enhance(1 + 0.9 * m)
        assert np.abs(levels - np.asarray(want).astype(int)).max() <= 1, m


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

    Which pixels those are is read off PIL's own picture of a white image, not off what is tested.
    """
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


# -------- What holds for every operation -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_a_result_depends_on_the_image_and_its_magnitude_alone(name):
    """Not on the rest of the batch, the layout in memory, the number of channels."""
    operation, images = AUGMENTATIONS[name], mixed((19, 23))
    magnitude = random_magnitude(name, len(images), seed=3)
    together = operation(images, magnitude)
    for x in (images.contiguous(memory_format=torch.channels_last), images[:1].expand(8, 3, 19, 23), images[..., ::2]):
        want = operation(x.contiguous(), magnitude)
        torch.testing.assert_close(operation(x, magnitude), want, rtol=0, atol=1e-6)
    gray = images[:, :1]
    want = operation(gray.expand(-1, 3, -1, -1), magnitude)[:, :1]
    torch.testing.assert_close(operation(gray, magnitude), want, rtol=0, atol=2e-6)
    if name != "SamplePairing":
        alone = [operation(images[i : i + 1], magnitude[i : i + 1]) for i in range(len(images))]
        torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=2e-6)
    if name in WITH_MAGNITUDE[:-1]:  # the magnitudes did something
        assert not torch.equal(together, operation(images, magnitude.flip(0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_range_shape_dtype_no_side_effects_and_magnitude_zero_is_the_identity(name, dtype):
    for size in SIZES[:4]:
        images = mixed(size, dtype)
        images[5], images[6], images[7] = 0, 1, images[7].round()
        for magnitude in (
            random_magnitude(name, 8, dtype=dtype),
            torch.zeros(8, dtype=dtype),
            torch.ones(8, dtype=dtype),
        ):
            for m in (magnitude, -magnitude) if name in SIGNED else (magnitude,):
                before = images.clone(), m.clone()
                out = AUGMENTATIONS[name](images, m)
                assert out.shape == images.shape and out.dtype == dtype and 0 <= out.min() and out.max() <= 1
                assert torch.equal(images, before[0]) and torch.equal(m, before[1])
                assert out.untyped_storage().data_ptr() != images.untyped_storage().data_ptr()
                if name in WITH_MAGNITUDE and not m.any():
                    # the affine ones scale coordinates to [-1, 1] and back: a few units in the last place
                    rounding = 4 * torch.finfo(dtype).eps * max(size) if name in AFFINE else 0
                    atol = max(1e-6, rounding) if dtype == torch.float32 else 1e-12
                    torch.testing.assert_close(out, images, rtol=0, atol=atol)


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


# -------- Gradients: joint_darts_faa.py's; those of dha.py's plain operations at the end -----------------------------


@pytest.mark.parametrize("name", [*AFFINE, *BLENDS, "SamplePairing"])
def test_gradients_equal_finite_differences(name):
    """Away from kinks: no value is clamped, no point of the affine ones lies on a pixel centre."""
    images = uniform(2, 3, 5, 4, dtype=torch.float64) * 0.4 + 0.3
    magnitude = torch.tensor([0.37, -0.61] if name in AFFINE else [0.13, -0.21], dtype=torch.float64)
    inputs = images.requires_grad_(), magnitude.requires_grad_()
    assert torch.autograd.gradcheck(WITH_GRADIENTS[name], inputs)


def gradients(operation, images, magnitude, upstream):
    """The gradients of images and magnitude; zeros where there is none."""
    images, magnitude = images.clone().requires_grad_(), magnitude.clone().requires_grad_()
    out = operation(images, magnitude)
    if not out.requires_grad:
        return torch.zeros_like(images), torch.zeros_like(magnitude)
    found = torch.autograd.grad(out, (images, magnitude), upstream, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip((images, magnitude), found)]


@pytest.fixture
def batch():
    """Images, magnitudes that are off their levels, an upstream gradient."""
    images = mixed((9, 7))
    return images, torch.linspace(0.001, 1.001, len(images)), uniform(*images.shape, seed=1) * 2 - 1


@pytest.mark.parametrize("name", [*WITHOUT_MAGNITUDE, "Solarize", "Posterize", "Identity"])
def test_gradients_of_the_other_operations(name, batch):
    """For the magnitude none, or -1: Faster AutoAugment has +1 for the threshold and the bits kept, which fall with it.

    For the image their own, or straight through: the identity's.
    """
    images, magnitude, upstream = batch
    inverted = images >= 1 - magnitude.view(-1, 1, 1, 1)
    solarized = torch.where(inverted, -upstream, upstream)
    own = {"HorizontalFlip": upstream.flip(3), "Invert": -upstream, "Solarize": solarized}
    of_images, of_magnitude = gradients(WITH_GRADIENTS[name], *batch)
    assert torch.equal(of_images, own.get(name, upstream)) and 0.1 < inverted.float().mean() < 0.9
    falling = name in ("Solarize", "Posterize")
    torch.testing.assert_close(of_magnitude, -falling * upstream.sum((1, 2, 3)))


@pytest.mark.parametrize("name", [*AFFINE, *BLENDS])
def test_pixels_at_the_ends_of_the_range_keep_their_gradient(name):
    """As in black padding. torch.clamp's gradient is 0 there from 2.14 on, and was 1 before."""
    upstream, zero = uniform(4, 3, 6, 6, seed=1), torch.zeros(4)
    for images in (uniform(4, 3, 6, 6).round(), torch.zeros(4, 3, 6, 6)):
        of_images, of_magnitude = gradients(WITH_GRADIENTS[name], images, zero, upstream)
        torch.testing.assert_close(of_images, upstream, rtol=0, atol=1e-5)
        assert not images.any() or of_magnitude.abs().min() > 0


@pytest.mark.parametrize("name", [name for name in dha.AUGMENTATIONS if name in joint.AUGMENTATIONS])
def test_added_gradients_change_no_result_and_dhas_operations_have_none_of_them(name, batch):
    for size in SIZES[:4]:
        images = mixed(size)
        magnitude = random_magnitude(name, len(images))
        assert torch.equal(*[script.AUGMENTATIONS[name](images, magnitude) for script in (dha, joint)])
    images, magnitude, upstream = batch
    of_images, of_magnitude = gradients(dha.AUGMENTATIONS[name], images, magnitude, upstream)
    if name in ("AutoContrast", "Equalize", "Posterize", "Solarize"):
        assert not of_magnitude.any()
    if name in ("AutoContrast", "Equalize"):
        assert not of_images.any()
    if name == "Posterize":  # 0 where bits are lost, else the identity
        assert torch.equal(of_images, torch.where((4 * magnitude).round().view(-1, 1, 1, 1) > 0, 0.0, upstream))
