"""An image-to-video model that starts as a text-to-video one: the same output, whatever the image."""

from typing import Any

import pytest
import torch

from sat.cogvideox.start import start_from_text_to_video
from sat.errors import CheckpointError
from tests.cogvideox.tiny import build, make_inputs


@pytest.mark.parametrize(("text", "image"), [("5B", "5B-I2V"), ("1.5-5B", "1.5-5B-I2V")])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_output_is_that_of_the_text_model(text: str, image: str, prefix: str) -> None:
    before, after = build(text), build(image, seed=1)
    state = {f"{prefix}{name}": value for name, value in before.state_dict().items()}
    own = {f"{prefix}{name}": value for name, value in after.state_dict().items()}
    completed = start_from_text_to_video(state, own, "a test")
    after.load_state_dict({name.removeprefix(prefix): value for name, value in completed.items()}, strict=True)
    inputs = make_inputs(text)
    ofs: dict[str, Any] = {"ofs": torch.tensor([2.0])} if image.startswith("1.5") else {}
    with torch.no_grad():
        expected = before(**inputs)
        for seed in (0, 1):
            images = torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(seed))
            torch.testing.assert_close(after(**inputs, concat_images=images, **ofs), expected, rtol=0.0, atol=2e-6)


def test_what_was_added_is_trained() -> None:
    before, after = build("1.5-5B"), build("1.5-5B-I2V", seed=1)
    after.load_state_dict(start_from_text_to_video(before.state_dict(), after.state_dict(), "a test"))
    inputs = make_inputs("1.5-5B-I2V")
    after(**inputs).square().mean().backward()
    assert after.get_parameter("ofs_embed.2.weight").grad.any()
    columns = after.get_parameter("mixins.patch_embed.proj.weight").grad.chunk(2, dim=1)
    assert columns[0].any() and columns[1].any()


def test_the_convolution_of_release_1_is_taken_too() -> None:
    before, after = build("5B"), build("5B-I2V", seed=1)
    state = before.state_dict()
    kernel = state["mixins.patch_embed.proj.weight"]
    older = {**state, "mixins.patch_embed.proj.weight": kernel.view(len(kernel), -1, 2, 2)}
    first, second = (start_from_text_to_video(own, after.state_dict(), "a test") for own in (state, older))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("text", "image", "message"),
    [
        ("5B-I2V", "5B-I2V", "takes 32 numbers a patch and the model 32: .* leave args.from_text_to_video out"),
        ("5B", "5B", "takes 16 numbers a patch and the model 16"),
        ("5B", "1.5-5B-I2V", "takes 16 numbers a patch and the model 64"),
    ],
)
def test_other_pairs_are_refused(text: str, image: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        start_from_text_to_video(build(text).state_dict(), build(image).state_dict(), "a test")


def test_a_file_without_a_transformer_is_refused() -> None:
    with pytest.raises(CheckpointError, match="a VAE holds no CogVideoX transformer"):
        start_from_text_to_video({"encoder.conv_in.weight": torch.zeros(1)}, build("5B").state_dict(), "a VAE")
