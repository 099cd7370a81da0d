"""A trained encoder outside of recipes: loaded with its preprocessing, on a folder of images, exported."""
