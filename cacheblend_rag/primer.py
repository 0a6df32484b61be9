"""The passage every chunk is read behind at ingestion, unless the user gives another.

A chunk that comes first in a context is read differently: its first tokens become attention sinks and take on features
that the same tokens never have in mid-prompt. Any unrelated passage before it avoids that. Its KV is computed once and
dropped, so it costs little per chunk. Changing a letter of it changes every chunk's key.
"""

DEFAULT_PRIMER = """\
The following is a collection of short passages from an archive. They were written by different people at different
times, and each of them stands for itself. Some describe places, some tell of people and what they did, others record
decisions, measurements, prices or the weather of a particular day. Names and numbers are given as the writers noted
them down. A passage may mention something that an earlier one explains, or contradict it, for nobody has compared them.
The order in which they appear means nothing. Whoever reads them with a question in mind should look at every passage,
remember what bears on the question, and leave the rest aside.

The first passage is about the archive's own building. It stands on a low hill beside the old road, has two floors and a
cellar, and was put up as a grain store. When the roof was renewed, the shelves were moved upstairs, where the air is
dry, and the windows to the south were walled up to keep out the light. A clerk comes in the mornings to answer letters.

The next passage:

"""
