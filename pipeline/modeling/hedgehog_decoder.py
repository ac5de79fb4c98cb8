"""A decoder whose attention is linear: what every converted model does, whatever family it comes from.

Norms, MLP, positions, initialisation and losses are the family's; the attention and its cache are ours. With
config.attention = "softmax" the layers keep transformers' own attention, so the same class is also the softmax
baseline, with the same arguments (segment_ids too), weight names and exactly the family's numbers.

B batch, L length. This file travels with every export: it imports torch, transformers and the files that travel along.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, cast

import torch
import transformers
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ...kernels.backends import Backend, select_attention_backend
from ...kernels.linear_attention import run_index_BL
from .given_inputs import check_mask_of_past, hedgehog_cache, padding_mask
from .hedgehog_attention import HedgehogAttention
from .hedgehog_cache import CACHE_NAME, HedgehogCache, the_cache_given
from .hedgehog_model import HedgehogPreTrainedModel, as_a_dataclass
from .positions import first_tokens, packed_segments, row_positions

logger = logging.getLogger(__name__)

PACKING_NAMES = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""What transformers' data collators say of packed rows, to attention that reads it."""


class HedgehogDecoder(HedgehogPreTrainedModel):
    """The decoder stack: token ids → last hidden states, with a HedgehogCache (linear) or DynamicCache (softmax).

    A family gives its layers, what goes into the first and what follows the last; its __init__ ends with `begin`.
    """

    unread_arguments: ClassVar[tuple[str, ...]] = ()
    """Arguments of the family's own model that this one does not read, and so refuses."""

    def decoder_layers(self) -> nn.ModuleList:
        """The layers, in their order."""
        raise NotImplementedError

    def attention_of(self, layer: nn.Module) -> nn.Module:
        """A layer's attention module."""
        raise NotImplementedError

    def enter(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """What the first layer reads (B, L, hidden), and what every layer is given of positions."""
        raise NotImplementedError

    def leave(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The final norm."""
        raise NotImplementedError

    def num_positions(self) -> int | None:
        """How many there are, where they are a table."""
        return None

    def begin(self) -> None:
        """The last step of __init__."""
        self.gradient_checkpointing = False
        self.report: Callable[[str], None] = logger.info
        """Told once which implementation of linear attention runs, and why."""
        self._reported: set[str] = set()
        self.post_init()

    def attentions(self) -> Iterator[nn.Module]:
        """The attention modules, in the order of the layers."""
        return (self.attention_of(layer) for layer in self.decoder_layers())

    def _first_attention(self) -> HedgehogAttention:
        return cast(HedgehogAttention, self.attention_of(self.decoder_layers()[0]))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        segment_ids: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Hidden states (B, L, hidden). `attention_mask` (B, L) or (B, past + L), 1 for real tokens, 0 for padding.

        `segment_ids` (B, L): packed sequences. Runs of equal ids attend only to themselves, and positions start
        again at each unless `position_ids` says otherwise. They exclude a cache. Linear attention also takes them
        as transformers' collators say them: `seq_idx`, `cu_seq_lens_q`, or `position_ids` that start again, without
        a mask.
        `use_cache` defaults to config.use_cache in eval mode and to False in training. `past_key_values` and `cache`
        are the same: transformers has the second name from 5.24 on.
        ValueError for a mask or a cache that does not fit the tokens, with the cure.
        """
        cache = the_cache_given(past_key_values, cache)
        for name in self.unread_arguments:
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"{name}: a converted model does not read it; leave it out")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        wants_attentions = kwargs.pop("output_attentions", None)
        if self.config.output_attentions if wants_attentions is None else wants_attentions:
            raise ValueError("output_attentions: attention weights are never formed here; use hidden states or logits")
        if inputs_embeds is None:
            inputs_embeds = cast(torch.Tensor, self.get_input_embeddings()(input_ids))
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        segment_ids = self._segments(inputs_embeds, attention_mask, position_ids, segment_ids, cache, kwargs)
        if segment_ids is not None:
            if cache is not None:
                raise ValueError("segment_ids are for whole packed rows: they cannot go on from past_key_values")
            use_cache = False
        if self.gradient_checkpointing and self.training:
            if cache is not None:
                raise ValueError(
                    "past_key_values cannot be read under gradient checkpointing, which runs each layer twice: say "
                    "model.eval() or use_cache=False, to generate() too"
                )
            use_cache = False
        if use_cache and cache is None:
            cache = self._new_cache()

        of_this_attention = self._linear_inputs if self.config.attention == "linear" else self._softmax_inputs
        layer_inputs = of_this_attention(inputs_embeds, attention_mask, position_ids, segment_ids, cache)
        num_seen = 0 if cache is None else cache.get_seq_length()
        is_given = position_ids is not None
        self._check_positions(num_seen + inputs_embeds.shape[1], layer_inputs["position_ids"], is_given)
        hidden_states, of_positions = self.enter(inputs_embeds, layer_inputs["position_ids"])

        named_cache: dict[str, Any] = {CACHE_NAME: cache}
        num_real_B = layer_inputs.pop("num_real_tokens_B", None)
        all_hidden_states: list[Any] | None = [hidden_states] if output_hidden_states else None
        for decoder_layer in self.decoder_layers():
            hidden_states = decoder_layer(
                hidden_states,
                use_cache=use_cache,
                **of_positions,
                **named_cache,
                **layer_inputs,
                **kwargs,
            )
            if all_hidden_states is not None:
                all_hidden_states.append(hidden_states)
        if isinstance(cache, HedgehogCache) and num_real_B is not None:
            if not torch.compiler.is_compiling() and cache.get_seq_length() == num_seen:
                raise RuntimeError(  # each token would be decoded as if it were the first
                    f"transformers {transformers.__version__} does not hand layers their cache as '{CACHE_NAME}': "
                    "install a version from 5.17 to 5.24, or say use_cache=False"
                )
            cache.end_reading(num_real_B)
        hidden_states = self.leave(hidden_states)
        if all_hidden_states is not None:
            all_hidden_states[-1] = hidden_states  # as transformers does: the last entry is after the final norm
        named_cache[CACHE_NAME] = cache if use_cache else None
        result = BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=None if all_hidden_states is None else tuple(all_hidden_states),
            **named_cache,
        )
        return result if as_a_dataclass(return_dict, self.config) else result.to_tuple()

    def _check_positions(self, num_tokens: int, position_ids: torch.Tensor, is_given: bool) -> None:
        """ValueError for a position that does not exist. Padding needs none, so that only the ids themselves tell; on a
        GPU, which would have to be waited for, they are asked where there are more tokens than positions."""
        longest = self.num_positions()
        if longest is None or torch.compiler.is_compiling():
            return
        if num_tokens <= longest and not (is_given and position_ids.device.type == "cpu"):
            return
        last = int(position_ids.max())
        if last >= longest:
            raise ValueError(
                f"a token has position {last}, and this model's table of positions ends at {longest - 1}: give it "
                "shorter rows, or ask for fewer new tokens"
            )

    def _segments(
        self,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        segment_ids: torch.Tensor | None,
        cache: Cache | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor | None:
        """segment_ids (B, L), or what packs the rows of `tokens` (B, L, …) in transformers' ways (out of kwargs).

        With softmax attention that is left to transformers, which reads it where its attention can.
        """
        if self.config.attention == "softmax":
            return segment_ids
        packing = {name: kwargs.pop(name) for name in PACKING_NAMES if name in kwargs}
        if segment_ids is not None:
            return segment_ids
        positions = position_ids if attention_mask is None and cache is None else None
        return packed_segments((tokens.shape[0], tokens.shape[1]), positions, packing, tokens.device)

    def _new_cache(self) -> Cache:
        if self.config.attention == "linear":
            return HedgehogCache(self.config.num_hidden_layers)
        return DynamicCache(config=self.config)

    def _linear_inputs(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        segment_ids: torch.Tensor | None,
        cache: Cache | None,
    ) -> dict[str, Any]:
        """Masks and positions (B, L) of the new tokens. φ sees absolute positions, so padding must not count."""
        B, L = inputs_embeds.shape[:2]
        device = inputs_embeds.device
        cache = hedgehog_cache(cache, self._first_attention(), len(self.decoder_layers()), B)
        mask_BL = padding_mask(attention_mask, cache, (B, L), device)
        if segment_ids is not None:
            segment_ids = segment_ids.to(device)
        num_seen_B = torch.zeros(B, dtype=torch.long, device=device)
        if cache is not None and cache.num_real_tokens_B is not None:
            num_seen_B = cache.num_real_tokens_B
            # token by token only where asking costs nothing: a GPU would have to be waited for
            if attention_mask is not None and attention_mask.shape[1] > L and (L > 1 or device.type == "cpu"):
                check_mask_of_past(cache, attention_mask)
        if position_ids is None:
            position_ids = row_positions((B, L), mask_BL, segment_ids, device) + num_seen_B[:, None]
        position_ids = position_ids.to(device).expand(B, L)
        if cache is not None:
            cache.begin_reading()
        return {
            "attention_mask": mask_BL,
            "position_ids": position_ids,
            "segment_ids": segment_ids,
            "attention_backend": self._attention_backend(device, inputs_embeds.dtype),
            "num_real_tokens_B": num_seen_B + (L if mask_BL is None else mask_BL.sum(1)),
        }

    def _attention_backend(self, device: torch.device, dtype: torch.dtype) -> Backend:
        """The one place where the implementation of linear attention is chosen; reported once with its reason."""
        attention = self._first_attention()
        backend = select_attention_backend(
            self.config.attention_backend,
            device=device,
            dtype=dtype,
            num_features=attention.feature_map_q.num_features,
            value_dim=attention.head_dim,
            feature_map=self.config.feature_map,
            gradients=self.training and torch.is_grad_enabled(),
        )
        line = f"linear attention: {backend.name} ({backend.reason})"
        if not torch.compiler.is_compiling() and line not in self._reported:
            self._reported.add(line)
            self.report(line)
        return backend

    def _softmax_inputs(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        segment_ids: torch.Tensor | None,
        cache: Cache | None,
    ) -> dict[str, Any]:
        """Exactly what the family's own model gives its layers; with segment_ids a causal block-diagonal mask."""
        B, L = inputs_embeds.shape[:2]
        mask_BL = None
        if segment_ids is not None:
            segment_ids = segment_ids.to(inputs_embeds.device)
            mask_BL = None if attention_mask is None else attention_mask.to(inputs_embeds.device, torch.bool)
        if position_ids is None:
            if segment_ids is not None:
                position_ids = row_positions((B, L), mask_BL, segment_ids, inputs_embeds.device)
            else:
                past = 0 if cache is None else cache.get_seq_length()
                position_ids = (torch.arange(L, device=inputs_embeds.device) + past).unsqueeze(0)
        if segment_ids is not None:
            attention_mask = self._packed_softmax_mask(inputs_embeds, mask_BL, segment_ids)
        named_cache: dict[str, Any] = {CACHE_NAME: cache}
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **named_cache,
        )
        return {"attention_mask": causal_mask, "position_ids": position_ids}

    def _packed_softmax_mask(
        self, inputs_embeds: torch.Tensor, mask_BL: torch.Tensor | None, segment_ids_BL: torch.Tensor
    ) -> torch.Tensor:
        """(B, 1, L, L): which keys a query sees. Bool for SDPA, additive for eager attention."""
        implementation = self.config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"segment_ids with softmax attention need attn_implementation 'sdpa' or 'eager', not {implementation!r}"
            )
        run_BL = run_index_BL(segment_ids_BL, mask_BL)
        visible_BLL = (run_BL[:, :, None] == run_BL[:, None, :]).tril()
        if mask_BL is not None:
            visible_BLL = visible_BLL & mask_BL[:, None, :]
        # a padding row sees itself, or its softmax would be 0/0
        itself_LL = torch.eye(run_BL.shape[1], dtype=torch.bool, device=run_BL.device)
        visible_B1LL = (visible_BLL | itself_LL)[:, None]
        if implementation == "sdpa":
            return visible_B1LL
        lowest = torch.finfo(inputs_embeds.dtype).min
        return torch.zeros_like(visible_B1LL, dtype=inputs_embeds.dtype).masked_fill(~visible_B1LL, lowest)


class HedgehogCausalLM(HedgehogPreTrainedModel):
    """A decoder with its language-model head; generate() as usual (no assisted decoding: a state has no undo).

    A family's __init__ makes decoder and `lm_head`, and ends with `begin`.
    """

    lm_head: nn.Linear

    def begin(self) -> None:
        """The last step of __init__."""
        self.loss_type = "ForCausalLM"
        # tells generate() that tokens cannot be taken back
        self._is_stateful = self.config.attention == "linear"
        self.post_init()

    @property
    def decoder(self) -> HedgehogDecoder:
        """The stack below the head, by whatever name the family has it."""
        return cast(HedgehogDecoder, self.base_model)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        segment_ids: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits (B, L, vocab); see HedgehogDecoder.forward for masks, segments and cache.

        `labels` (B, L), −100 to leave out, are shifted inside. The first token of each packed segment is never a
        target, just as the first token of a row never is. `logits_to_keep`: the last n positions (0: all), or an
        index tensor of positions.
        """
        if input_ids is not None or inputs_embeds is not None:
            tokens = cast(torch.Tensor, input_ids if inputs_embeds is None else inputs_embeds)
            given = the_cache_given(past_key_values, cache)
            segment_ids = self.decoder._segments(tokens, attention_mask, position_ids, segment_ids, given, kwargs)
        loss_kwargs = {name: kwargs.pop(name) for name in ("num_items_in_batch", "shift_labels") if name in kwargs}
        outputs = self.decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=the_cache_given(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            segment_ids=segment_ids,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])

        loss = None
        if labels is not None:
            if segment_ids is not None:
                mask_BL = None if attention_mask is None else attention_mask.to(segment_ids.device, torch.bool)
                labels = labels.masked_fill(first_tokens(segment_ids, mask_BL).to(labels.device), -100)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_kwargs)
        named_cache: dict[str, Any] = {CACHE_NAME: getattr(outputs, CACHE_NAME)}
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **named_cache,
        )
        return result if as_a_dataclass(return_dict, self.config) else result.to_tuple()

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Give generate() a HedgehogCache where it would make a DynamicCache; look at one that was given."""
        given = model_kwargs.get(CACHE_NAME)
        if isinstance(given, HedgehogCache) and given.get_seq_length() > 0:
            if generation_config.use_cache is False:
                raise ValueError("use_cache=False beside past_key_values: leave one of them out")
            of_all_tokens = (
                model_kwargs.get(name) for name in ("attention_mask", "position_ids")
            )  # a mask of ones: None
            length = next((x.shape[1] for x in of_all_tokens if x is not None and x.ndim == 2), None)
            if length is not None and length <= given.get_seq_length():
                raise ValueError(
                    f"past_key_values has read {given.get_seq_length()} tokens and the input has {length}: give "
                    "generate() the whole sequence, with at least one token that was not read"
                )
            check_mask_of_past(given, model_kwargs.get("attention_mask"))
        if self.config.attention == "linear" and model_kwargs.get(CACHE_NAME) is None:
            if generation_config.use_cache is False:
                return
            if generation_config.cache_implementation not in (None, "dynamic"):
                raise ValueError(
                    f"cache_implementation={generation_config.cache_implementation!r}: linear attention has one kind "
                    "of cache, of constant size; leave cache_implementation out"
                )
            model_kwargs[CACHE_NAME] = HedgehogCache(self.config.num_hidden_layers)
            return
        super()._prepare_cache_for_generation(  # pyright: ignore[reportAttributeAccessIssue] (GenerationMixin's self)
            generation_config, model_kwargs, *args, **kwargs
        )


__all__ = ["HedgehogCausalLM", "HedgehogDecoder"]
