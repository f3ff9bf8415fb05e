"""One module per package that quantizes; each keeps its imports of that package inside of the function that runs."""
