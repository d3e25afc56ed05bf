"""Images in tar files, the WebDataset layout: `KEY.jpg` beside `KEY.cls` or `KEY.json`.

The tar files are read at random access, through an index of where each member lies, and not
streamed as the webdataset library does. A stream has to split the shards among processes and
workers and can only mix what is in its buffers: the order then depends on how many there are, an
epoch is no permutation, and a run resumes in its middle only by reading and dropping what it
saw. With an index a shard set is a list like any other: `EpochBatches` gives the same global order
on any number of processes and workers, and a run resumes at any step without reading anything.

The price is one pass over the headers, kept on the disk, and reads of one image at a time instead
of long ones: no matter on an SSD or in the page cache, slow on a spinning disk.

`python -m deco_fast.data.shards pack FOLDER OUT` writes class folders as shards.
"""

from deco_fast.data.shards.source import ShardImages, index_share

__all__ = ["ShardImages", "index_share"]
