"""Other layouts' names, as data: released `target:` strings, released keys, other libraries' weight names."""
