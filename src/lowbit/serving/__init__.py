"""One model behind OpenAI's HTTP interface, and the what-if page of its `tune` report beside it.

worker.py       the thread that computes: requests in, tokens out
protocol.py     requests and answers in OpenAI's words
app.py          the routes
selections.py   what readers of the page chose, kept in a file
"""
