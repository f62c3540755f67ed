"""Structured output: grammars compiled aside, and which tokens a sequence may go on with.

llguidance does the matching. It is loaded, and the vocabulary handed to it, when the engine has
first been idle for a second, at the latest for the first grammar: that keeps the interpreter to
itself for moments. Compiling and masks run on threads without the interpreter's lock, masks while
the model computes the same step's logits. What takes longer than that delays the sequence it is
for and no other. Torch-free.
"""

import os
import threading
from collections import OrderedDict
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import numpy as np

from crane.models.tokenizer import Tokenizer, trim_memory
from crane.runtime.thinking import Section, ThinkingTracker
from crane.runtime.types import SamplingParams

# Marks around tool calls are text to a grammar, also where a vocabulary calls them special.
TEXT_MARKS = ("<tool_call>", "</tool_call>", "<tool_calls>", "</tool_calls>")


MAX_GRAMMAR_CHARS = 1 << 19
_SHORT_GRAMMAR_CHARS = 1 << 14  # takes a few milliseconds at most
# llguidance recurses as deep as rules refer to rules; a stack is only as large as what is used of it
_STACK_BYTES = 256 << 20


class GrammarError(Exception):
    """A grammar does not compile. `str` says why."""


class GrammarCompiler:
    """Grammars of one vocabulary, compiled on threads and kept, the least recently used forgotten.

    vocab_size: ids that can be drawn. eos_ids: ids that are never text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int], max_kept: int = 128):
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._max_kept = max_kept
        self._kept: OrderedDict[str, Future] = OrderedDict()
        self._vocabulary: Future | None = None
        # a thread starts when it is first needed; grammars must not keep masks waiting
        self._grammars = ThreadPoolExecutor(1, "grammar")
        self._masks = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "mask")
        self.special_ids = tokenizer.special_ids | eos_ids
        self.vocab_size = vocab_size
        self.num_words = (vocab_size + 1 + 31) // 32  # one more id says that the grammar may end

    def prepare(self) -> Future:
        """Have the vocabulary ready for the first grammar."""
        if self._vocabulary is None:
            self._vocabulary = self._grammars.submit(_vocabulary, self._tokenizer, self.vocab_size, self._eos_ids)
        return self._vocabulary

    def compile(self, grammar: str) -> Future:
        """A future of the grammar's matcher in its first state, to be copied; it may hold a GrammarError."""
        self.prepare()
        found = self._kept.get(grammar)
        if found is None:
            found = self._kept[grammar] = self._grammars.submit(_compile, grammar, self._vocabulary)
        self._kept.move_to_end(grammar)
        while len(self._kept) > self._max_kept:
            self._kept.popitem(last=False)
        return found

    def problem(self, grammar: str) -> str | None:
        """What is wrong with a grammar, as far as a short look shows: long ones are left to `compile`."""
        if len(grammar) > MAX_GRAMMAR_CHARS:
            return f"the grammar is longer than {MAX_GRAMMAR_CHARS} characters"
        if len(grammar) > _SHORT_GRAMMAR_CHARS or grammar in self._kept:
            return None
        message = _deeply(_validate, grammar)
        return f"the grammar does not compile: {first_lines(message)}" if message else None

    def constraint(self, sampling: SamplingParams, stop_ids: frozenset[int]) -> "Constraint | None":
        """What one sequence with these parameters has to obey, or None."""
        if sampling.grammar is None and sampling.thinking is None:
            return None
        compiled = None if sampling.grammar is None else self.compile(sampling.grammar)
        return Constraint(self, compiled, sampling, stop_ids, self._eos_ids)

    def submit_mask(self, matcher, bits: np.ndarray) -> Future:
        """Have the tokens that `matcher` allows next written into `bits`, int32 [num_words]."""
        return self._masks.submit(_fill, matcher, bits)


class Constraint:
    """Which tokens one sequence may go on with: its thinking section, then its grammar.

    Advanced by tokens, not by computing, so a recomputed sequence has what it had. Called by
    the engine's thread only. error: why the sequence cannot go on, or None. finished: the
    grammar is complete and allows nothing more.
    """

    def __init__(self, compiler: GrammarCompiler, compiled: Future | None, sampling: SamplingParams,
                 stop_ids: frozenset[int], eos_ids: frozenset[int]):
        self._compiler = compiler
        self._compiled = compiled
        self._tracker = ThinkingTracker(sampling.thinking) if sampling.thinking else None
        self._min_tokens = sampling.min_tokens
        self._stop_ids = stop_ids
        self._text_stop_ids = stop_ids - compiler.special_ids
        self._end_ids = stop_ids | eos_ids
        self._matcher = None
        self._follows = True  # the tokens so far, perhaps the beginning of a start mark, also match the grammar
        self._mask: Future | None = None
        self._bits: np.ndarray | None = None
        self._num_tokens = 0
        self.error: str | None = None
        self.finished = False

    @property
    def waits(self) -> bool:
        """The next token cannot be drawn yet: the grammar, or a late mask, is being computed."""
        return any(not future.done() for future in self.pending)

    @property
    def pending(self) -> list[Future]:
        """What it may wait for."""
        compiled = None if self._matcher is not None else self._compiled
        return [future for future in (compiled, self._mask) if future is not None]

    @property
    def reasoning_tokens(self) -> int:
        return self._tracker.num_tokens if self._tracker else 0

    @property
    def _section(self) -> Section:
        return self._tracker.section if self._tracker else Section.OVER

    def check(self) -> str | None:
        """Why the grammar does not compile, when that is known by now; else None."""
        compiled = self._compiled
        if compiled is not None and compiled.done() and compiled.exception() is not None:
            error = compiled.exception()
            self.error = str(error) if isinstance(error, GrammarError) else f"{type(error).__name__}: {error}"
        return self.error

    @property
    def applies(self) -> bool:
        """Not every token is allowed next."""
        if self._compiled is not None:
            return True
        return self._tracker is not None and self._tracker.forced_id is not None

    def start(self) -> None:
        """Begin to find out which tokens are allowed next. Not while it `waits` for its grammar."""
        if self._compiled is not None and self._matcher is None:
            self._matcher = self._compiled.result().deep_copy()
        if self._bits is None and self._asks_grammar():
            self._bits = np.zeros(self._compiler.num_words, np.int32)
            self._mask = self._compiler.submit_mask(self._matcher, self._bits)

    def _asks_grammar(self) -> bool:
        return self._matcher is not None and self._section is not Section.OPEN and self._follows

    def allowed(self, timeout_s: float) -> np.ndarray | None:
        """Bits of the allowed tokens, uint32 [num_words], lowest first; None: not known in time."""
        if self._mask is not None:
            if not self._mask.done() and self._mask not in wait([self._mask], timeout_s).done:
                return None
            self._mask.result()
            return self._after_grammar(self._bits.view(np.uint32).copy())
        bits = np.zeros(self._compiler.num_words, np.uint32)
        forced = self._tracker.forced_id
        if forced is not None or self._section is Section.UNDECIDED:
            _set(bits, [self._tracker.start_id if forced is None else forced])
        else:  # inside the section, which must not be the end of the output
            bits[:] = 0xFFFFFFFF
            _clear(bits, self._end_ids)
        return bits

    def _after_grammar(self, bits: np.ndarray) -> np.ndarray:
        """What llguidance allows, with the ids that end this sequence where the grammar may end."""
        may_end = _has(bits, self._compiler.vocab_size)
        _clear(bits, [self._compiler.vocab_size])
        if may_end and self._num_tokens >= self._min_tokens:
            _set(bits, self._stop_ids)
        elif self._text_stop_ids:  # as text the grammar may allow them, but they would cut it short
            grammar_only = bits.copy()
            _clear(bits, self._text_stop_ids)
            bits = bits if bits.any() else grammar_only
        if self._section is Section.UNDECIDED:
            _set(bits, [self._tracker.start_id])
        if not bits.any():
            # only now is it clear that nothing can follow; a sequence that ignores these ids ends all the same
            _set(bits, self._end_ids or [0])
        return bits

    def advance(self, token_id: int) -> None:
        """The sequence goes on with this token. Sets `finished` or `error`."""
        self._num_tokens += 1
        self._mask = self._bits = None
        before = self._section
        if self._tracker:
            self._tracker.push(token_id)
        if self._matcher is None or before is Section.OPEN:
            return
        if self._section is Section.OPEN:
            self._matcher.reset()
            self._follows = True
        elif before is Section.UNDECIDED and self._section is before and not self._accepts(token_id):
            self._follows = False
        elif token_id in self._end_ids and self._matcher.is_accepting() and not self._accepts(token_id):
            self.finished = True
        elif self._follows and not self._matcher.consume_token(token_id):
            self.error = f"the grammar cannot go on: {first_lines(self._matcher.get_error())}"
        else:
            self.finished = self._follows and self._matcher.is_stopped()

    def _accepts(self, token_id: int) -> bool:
        return self._follows and self._matcher.validate_tokens([token_id]) == 1


def wait_any(constraints: list[Constraint], timeout_s: float) -> None:
    """Return when one of them may have stopped waiting."""
    pending = [future for constraint in constraints for future in constraint.pending if not future.done()]
    if pending:
        wait(pending, timeout_s, FIRST_COMPLETED)


def first_lines(message: str) -> str:
    """An error of llguidance without its excerpt of the grammar."""
    return " ".join(message.split("\n   1 |")[0].split("<non-verbose/>")[0].split())


def limits():
    """How much work one grammar may be."""
    import llguidance

    # a lexer state takes up to 2 kB
    return llguidance.LLParserLimits(verbose_errors=False, max_lexer_states=50_000)


class _Vocabulary:
    """A tokenizer as llguidance wants it: token bytes, which of them are not text, and encoding.

    The id behind the last one stands for the end of a grammar, whatever ends a sequence.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int]):
        self._tokenizer = tokenizer
        self.eos_token_id = vocab_size
        self.tokens = [tokenizer.token_bytes(i) for i in range(vocab_size)] + [b"<|end of grammar|>"]
        marks = {tokenizer.token_to_id(mark) for mark in TEXT_MARKS}
        special = {i for i in (tokenizer.special_ids - marks) | eos_ids if i < vocab_size}
        self.special_token_ids = [*sorted(special), vocab_size]

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode(errors="replace")
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return [i for i in ids if i < self.eos_token_id]


def _vocabulary(tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int]):
    import llguidance

    wrapper = _Vocabulary(tokenizer, vocab_size, eos_ids)
    # in two calls, so that a step that runs can go on between them: each keeps the interpreter's lock for 0.2 s
    plain = llguidance.LLTokenizer(wrapper, n_vocab=vocab_size + 1, eos_token=vocab_size, slices=[])
    vocabulary = plain.with_slices(llguidance.LLTokenizer.general_slices())
    del plain, wrapper
    trim_memory()
    return vocabulary


def _validate(grammar: str) -> str | None:
    import llguidance

    failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, limits=limits())
    return messages[0] if failed else None


def _compile(grammar: str, vocabulary: Future):
    matcher = _deeply(_new_matcher, grammar, vocabulary.result())
    if matcher.is_error():
        raise GrammarError(f"the grammar does not compile: {first_lines(matcher.get_error())}")
    return matcher


def _new_matcher(grammar: str, vocabulary):
    import llguidance

    return llguidance.LLMatcher(vocabulary, grammar, log_level=0, limits=limits())


def _deeply(function, *args):
    """`function(*args)` on a thread with a deep stack."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*args)), daemon=True)
    default = threading.stack_size(_STACK_BYTES)
    try:
        thread.start()
    finally:
        threading.stack_size(default)
    thread.join()
    if not results:
        raise GrammarError("the grammar cannot be compiled")
    return results[0]


def _fill(matcher, bits: np.ndarray) -> None:
    # by holding `bits`, the task keeps its memory alive when the sequence is gone
    matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)


def _set(bits: np.ndarray, ids) -> None:
    for i in ids:
        bits[i >> 5] |= np.uint32(1 << (i & 31))


def _clear(bits: np.ndarray, ids) -> None:
    for i in ids:
        bits[i >> 5] &= np.uint32(0xFFFFFFFF ^ (1 << (i & 31)))


def _has(bits: np.ndarray, i: int) -> bool:
    return bool(bits[i >> 5] >> np.uint32(i & 31) & np.uint32(1))
