"""From artifacts to one offline page: numbers (plain data), figures (SVG), thumbnails, templates."""
