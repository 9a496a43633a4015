"""Conversations with a model that has a chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

from lmjax.data.chat import check_messages, end_of_turn, need_template
from lmjax.data.reading import Reader, check_told
from lmjax.decoding.answers import DecodingOptions, answer
from lmjax.decoding.inputs import check_ids
from lmjax.decoding.reading import generator_of
from lmjax.errors import UserError
from lmjax.models.model import Model
from lmjax.nn.module import Params
from lmjax.sharding import Layout


class Speaker:
    """Says what the assistant says next.

    Args:
      model, layout: of the parameters.
      reader: of the model.
      imported: `HFModel.source`, if the weights were imported.
    Raises:
      UserError: the model is no decoder or has no chat template, or its files ask for tokens that
        lmjax would not give.
    """

    def __init__(self, model: Model, layout: Layout, reader: Reader,
                 imported: Mapping[str, Any] | None = None):
        if model.config.family != "decoder":
            raise UserError("a decoder, which continues conversations",
                            f"an {model.config.family}", "use lm.generate or lm.embed")
        self.reader, self.tokenizer = reader, reader.names.tokenizer
        self.template, self.ends = need_template(self.tokenizer), end_of_turn(self.tokenizer)
        if imported:
            check_told(imported)
        self.generator = generator_of(model, layout, reader, self.ends.ids)

    def __call__(self, params: Params, messages: Sequence[Mapping[str, str]],
                 **options: Any) -> str:
        """The answer to a conversation, up to the end of the turn; see `LM.chat`."""
        text = self.template.render(check_messages(messages, "messages"), prompt=True)
        prompt, _ = self.tokenizer.spans_with_specials(text)
        ids = check_ids([prompt], self.generator.model.config, "messages")
        stop = options.pop("stop", ())
        stop = [*([stop] if isinstance(stop, str) else stop), *self.ends.strings]
        return answer(self.generator, params, self.reader.names, ids,
                      DecodingOptions(stop=stop, **options))[0].strip()
