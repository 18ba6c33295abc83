"""Evaluation: image sets, runs, features kept, metrics, report.

| what changes | where |
|---|---|
| which sets there are: counts, folders, digests | ``known``; ``names`` beside data, ``strings`` |
| how a set is found and read | ``sets``; ``folders``, ``fine_grained``, ``official``, ``tables``, ``tars``, ``small`` |
| what is refused before the first image | ``checks``, ``layout``, and by the model's own answers ``preflight`` |
| how images are gone through, shared out | ``run`` of ``several`` methods, ``place``, ``ray``, ``spec`` |
| what is written | ``rows`` of ``answers``, ``features``, and beside them ``folder`` |
| what is computed from rows | ``metrics``; the papers' figures are ``published`` |
| what is shown | ``report``, as HTML ``page`` and its ``gallery`` |
"""
