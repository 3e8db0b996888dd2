"""Login with other people's accounts: who they are is their provider's word.

`provider.py` is what a provider has to do, `github.py` is one, `registry.py` knows them all;
`state.py` ties the two ends of a login to one browser, `http.py` is the way to the provider.
"""
