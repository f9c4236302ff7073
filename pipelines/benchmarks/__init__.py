"""Public benchmarks and data sets of your own as queries, candidates and relevance: a table of rows, and readers.

    table.py      the rows: what each dataset asks, how it is scored, where its files lie
    contract.py   what a reader gives: queries, candidates, pools, relevance; and the checks on them
    mmeb.py       MMEB-V2: images, videos as folders of frames
    pages.py      document sets: queries, corpus and qrels in parquet
    mbeir.py      M-BEIR: queries, pools and qrels as lines
    own.py        queries, corpus, qrels of your own
    library.py    which of them are there, what to fetch for the others, and opening one

What is scored with them is `rzen.evaluation`, which knows `table` and `contract` alone.
"""
