"""A T5 tokenizer made offline, where the real one (32100 pieces) cannot be had."""

import string

from transformers import T5Tokenizer

# Common words of captions; every other word is spelt letter by letter.
WORDS = """
a an the of in on at to by from with without and or as is are its it this that there through over under between behind
beside along across into towards ahead left right straight up down near far away around
car road street highway bend curve lane kerb tyre wheel vehicle truck drive drives driving turns turn rolls passes
follows moves moving slowly fast speed brakes reverses coasts camera view seen shot scene video clip footage
desert snow forest city coast field grass sand hill hills mountain mountains mesa mesas tree trees house houses bridge
sea lake river sky cloud clouds sun horizon landscape distance ground light lights shadow rain fog mist night day noon
dusk dawn sunset morning evening winter summer clear cloudy rainy foggy sunny wide narrow long sandy distant striped
red blue green yellow white black grey orange purple brown bright dark small large wet dry old new
man woman person people child dog cat bird walks runs stands looks smiles hand face water fire
one two three game world color colour detailed realistic cinematic quality high low
"""


def make_tokenizer(max_length: int) -> T5Tokenizer:
    """A unigram tokenizer of `WORDS` and all printable ASCII characters; prompts are cut at `max_length` tokens."""
    space = "▁"  # sentencepiece's mark of a word's beginning
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, space: -4.0}
    pieces |= dict.fromkeys(string.ascii_letters + string.digits + string.punctuation, -8.0)
    for word in WORDS.split():
        pieces |= {space + word: -6.0, space + word.capitalize(): -7.0}
    # From a file, T5Tokenizer would make a vocabulary of its own four special tokens; from pieces it keeps them all.
    return T5Tokenizer(vocab=list(pieces.items()), extra_ids=0, model_max_length=max_length)
