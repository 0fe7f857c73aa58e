//! mount(2) and umount2(2): Python has no calls for them.

use std::ffi::CString;
use std::path::PathBuf;

use pyo3::prelude::*;
use rustix::mount::{MountFlags, UnmountFlags};

use crate::border::{os_error, value_error};

#[pyfunction]
#[pyo3(signature = (source, path, kind, options, *, read_only = false))]
pub fn mount(py: Python<'_>, source: &str, path: PathBuf, kind: &str, options: &str, read_only: bool) -> PyResult<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    let flags = if read_only { flags | MountFlags::RDONLY } else { flags };
    let options = CString::new(options).map_err(value_error)?;
    py.detach(|| rustix::mount::mount(source, &path, kind, flags, &*options))
        .map_err(|error| os_error(error, &path.display().to_string()))
}

#[pyfunction]
#[pyo3(signature = (path, *, lazy = false, force = false))]
pub fn unmount(py: Python<'_>, path: PathBuf, lazy: bool, force: bool) -> PyResult<()> {
    let mut flags = UnmountFlags::NOFOLLOW;
    flags.set(UnmountFlags::DETACH, lazy);
    flags.set(UnmountFlags::FORCE, force);
    py.detach(|| rustix::mount::unmount(&path, flags)).map_err(|error| os_error(error, &path.display().to_string()))
}
