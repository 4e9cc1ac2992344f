//! Promise: unsafe code is in the files named here and nowhere else. That each block says why it is sound is for clippy
//! (`undocumented_unsafe_blocks` and `missing_safety_doc` in Cargo.toml).

use std::fs;
use std::path::Path;

const UNSAFE: [&str; 7] = [
    "src/cpu/add.rs",
    "src/cpu/element.rs",
    "src/cpu/memory.rs",
    "src/cpu/mod.rs",
    "src/cuda/launch.rs",
    "src/cuda/memory.rs",
    "src/cuda/mod.rs",
];

fn files_with_unsafe(dir: &Path, found: &mut Vec<String>) -> std::io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            files_with_unsafe(&path, found)?;
            continue;
        }
        let source = fs::read_to_string(&path)?;
        let code = source
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"));
        let is_unsafe = |line: &str| {
            ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"]
                .iter()
                .any(|form| line.contains(form))
        };
        // A block may open on the next line.
        if code
            .into_iter()
            .any(|line| is_unsafe(line) || line.trim_end().ends_with("unsafe"))
        {
            let name = path
                .strip_prefix(env!("CARGO_MANIFEST_DIR"))
                .unwrap_or(&path);
            found.push(name.to_string_lossy().replace('\\', "/"));
        }
    }
    Ok(())
}

#[test]
fn unsafe_code_is_where_it_is_expected() -> std::io::Result<()> {
    let mut found = Vec::new();
    files_with_unsafe(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
        &mut found,
    )?;
    found.sort();
    assert_eq!(found, UNSAFE);
    Ok(())
}
