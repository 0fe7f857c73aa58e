//! Writes `python/blkloom/version.py` when the version in the workspace's `Cargo.toml` has changed. Commands read it there:
//! loading the engine, or asking the installed package, takes longer than all else they do.

use std::path::Path;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let path = Path::new("../../python/blkloom/version.py");
    println!("cargo::rerun-if-changed={}", path.display());
    println!("cargo::rerun-if-changed=build.rs");
    let version = env::var("CARGO_PKG_VERSION").map_err(io::Error::other)?;
    let text = format!(
        "\"\"\"The version of blkloom; engine/python/build.rs writes this file.\"\"\"\n\n\
         from __future__ import annotations\n\n\
         from typing import Final\n\n\
         VERSION: Final = \"{version}\"\n"
    );
    // Writing an unchanged file would make it newer than this run, and Cargo would run the script again.
    if fs::read_to_string(path).ok().as_ref() != Some(&text) {
        fs::write(path, text)?;
    }
    Ok(())
}
