"""An encoder and a decoder that attends to it."""

from typing import Any

import torch
from torch import Tensor, nn

from sat.model.base_model import BaseMixin, BaseModel


class EncoderFinalMixin(BaseMixin):
    """The encoder returns hidden states instead of logits."""

    def final_forward(self, logits: Tensor) -> Tensor:
        return logits


class EncoderDecoderModel(nn.Module):
    """Two models, by default with one word embedding. `args` with `dec_NAME` set gives the decoder its own NAME."""

    def __init__(
        self,
        args: Any = None,
        encoder: BaseModel | None = None,
        decoder: BaseModel | None = None,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.encoder = encoder if encoder is not None else BaseModel(args, **kwargs)
        self.decoder = decoder if decoder is not None else BaseModel(decoder_arguments(args), is_decoder=True, **kwargs)
        self.encoder.add_mixin("final", EncoderFinalMixin())
        if tie_word_embeddings:
            self.decoder.transformer.word_embeddings = self.encoder.transformer.word_embeddings

    def encode(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | int | None = None,
        **context: Any,
    ) -> Tensor:
        """Hidden states of the encoder (b m d)."""
        return self.encoder(input_ids, _positions(input_ids, position_ids), attention_mask, **context)[0]

    def decode(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | int | None = None,
        *,
        encoder_outputs: Tensor,
        cross_attention_mask: Tensor | None = None,
        **context: Any,
    ) -> list[Any]:
        """Logits of the decoder (b s v) and the per-layer dicts; causal where no mask is given."""
        return self.decoder(
            input_ids,
            _positions(input_ids, position_ids),
            -1 if attention_mask is None else attention_mask,
            encoder_outputs=encoder_outputs,
            cross_attention_mask=cross_attention_mask,
            **context,
        )

    def forward(
        self,
        enc_input_ids: Tensor,
        dec_input_ids: Tensor,
        *,
        enc_position_ids: Tensor | None = None,
        dec_position_ids: Tensor | None = None,
        enc_attention_mask: Tensor | None = None,
        dec_attention_mask: Tensor | int | None = None,
        cross_attention_mask: Tensor | None = None,
        **context: Any,
    ) -> tuple[Any, ...]:
        """Encode and decode. Cross attention uses the encoder's mask unless it has its own.

        Returns encoder output, decoder logits, then the decoder's per-layer dicts.
        """
        encoder_outputs = self.encode(enc_input_ids, enc_position_ids, enc_attention_mask, **context)
        decoded = self.decode(
            dec_input_ids,
            dec_position_ids,
            dec_attention_mask,
            encoder_outputs=encoder_outputs,
            cross_attention_mask=enc_attention_mask if cross_attention_mask is None else cross_attention_mask,
            **context,
        )
        return (encoder_outputs, *decoded)


def decoder_arguments(args: Any) -> dict[str, Any]:
    """The arguments with every `dec_NAME` that is set in the place of NAME."""
    values = dict(args) if isinstance(args, dict) else dict(vars(args))
    own = {name.removeprefix("dec_"): value for name, value in values.items() if name.startswith("dec_")}
    return {**values, **{name: value for name, value in own.items() if value is not None}}


def _positions(input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
    return torch.arange(input_ids.shape[1], device=input_ids.device) if position_ids is None else position_ids
