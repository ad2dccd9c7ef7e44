mod bucket;
mod directory;
