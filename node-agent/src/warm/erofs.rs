// SPDX-License-Identifier: Apache-2.0

//! A file system image that a sentry reads by itself (EROFS, the kernel's
//! `fs/erofs/erofs_fs.h`): without it, each sandbox has a gofer for the one file that its first
//! process is.
//!
//! The image has empty directories and one program, uncompressed, one block for each directory:
//!
//! ```text
//! block 0        1        2      3 …                   …
//! superblock     inodes   /      empty directories     the program
//! ```

use std::io;

const BLOCK: usize = 4096;
const BLOCK_BITS: u8 = 12;
/// Where the superblock is, bytes.
const SUPERBLOCK: usize = 1024;
const MAGIC: u32 = 0xE0F5_E1E2;
/// Bytes of an inode of the compact form, which is also what inodes are counted in.
const INODE: usize = 32;
/// Bytes of a directory's entry, without its name.
const DIRENT: usize = 12;
/// The block that the inodes are in.
const INODES: u32 = 1;

/// Kind and permissions, as stat(2) has them.
const DIRECTORY: u16 = 0o040_755;
const PROGRAM: u16 = 0o100_755;
/// `EROFS_FT_REG_FILE` and `EROFS_FT_DIR`.
const FILE_TYPE: u8 = 1;
const DIR_TYPE: u8 = 2;

/// Builds an image with `dirs`, which are empty, and the executable `program` called `name` in
/// its root.
///
/// # Errors
/// When there is too much of it for this simple form.
pub(crate) fn image(dirs: &[&str], name: &str, program: &[u8]) -> io::Result<Vec<u8>> {
    let too_large = || io::Error::other("too much for one image");
    let narrow = |n: usize| u32::try_from(n).map_err(|_| too_large());
    // Of the root, the directories, and the program, from 0 on.
    let program_node = dirs.len() + 1;
    if (program_node + 1) * INODE > BLOCK {
        return Err(too_large());
    }
    let mut entries = vec![
        (".", 0, DIR_TYPE),
        ("..", 0, DIR_TYPE),
        (name, program_node, FILE_TYPE),
    ];
    for (at, dir) in dirs.iter().enumerate() {
        entries.push((dir, at + 1, DIR_TYPE));
    }
    let root = directory(entries).ok_or_else(too_large)?;
    let first = INODES + 1;
    let program_block = first + narrow(program_node)?;
    let blocks = program_block + narrow(program.len().div_ceil(BLOCK))?;

    let mut image = vec![0; BLOCK];
    superblock(&mut image[SUPERBLOCK..], blocks, narrow(program_node + 1)?);
    let links = u16::try_from(dirs.len() + 2).map_err(|_| too_large())?;
    image.extend(inode(0, DIRECTORY, links, narrow(root.len())?, first));
    let mut data = vec![root];
    for at in 1..program_node {
        let empty = directory(vec![(".", at, DIR_TYPE), ("..", 0, DIR_TYPE)]);
        let empty = empty.ok_or_else(too_large)?;
        let size = narrow(empty.len())?;
        image.extend(inode(narrow(at)?, DIRECTORY, 2, size, first + narrow(at)?));
        data.push(empty);
    }
    let size = narrow(program.len())?;
    image.extend(inode(
        narrow(program_node)?,
        PROGRAM,
        1,
        size,
        program_block,
    ));
    for part in data.iter().map(Vec::as_slice).chain([program]) {
        image.resize(image.len().next_multiple_of(BLOCK), 0);
        image.extend_from_slice(part);
    }
    image.resize(image.len().next_multiple_of(BLOCK), 0);
    Ok(image)
}

/// `struct erofs_super_block`. What is not written is zero.
fn superblock(at: &mut [u8], blocks: u32, inodes: u32) {
    at[0..4].copy_from_slice(&MAGIC.to_le_bytes());
    at[12] = BLOCK_BITS;
    at[16..24].copy_from_slice(&u64::from(inodes).to_le_bytes());
    at[36..40].copy_from_slice(&blocks.to_le_bytes());
    at[40..44].copy_from_slice(&INODES.to_le_bytes());
}

/// `struct erofs_inode_compact`, of data that lie in whole blocks from `block` on.
fn inode(number: u32, mode: u16, links: u16, size: u32, block: u32) -> [u8; INODE] {
    let mut inode = [0; INODE];
    inode[4..6].copy_from_slice(&mode.to_le_bytes());
    inode[6..8].copy_from_slice(&links.to_le_bytes());
    inode[8..12].copy_from_slice(&size.to_le_bytes());
    inode[16..20].copy_from_slice(&block.to_le_bytes());
    inode[20..24].copy_from_slice(&number.to_le_bytes());
    inode
}

/// The data of a directory: its entries (`struct erofs_dirent`) in the order of their names, and
/// then the names. `None` when it takes more than a block.
fn directory(mut entries: Vec<(&str, usize, u8)>) -> Option<Vec<u8>> {
    entries.sort_unstable();
    let mut head = Vec::new();
    let mut names: Vec<u8> = Vec::new();
    for (name, node, kind) in &entries {
        let offset = entries.len() * DIRENT + names.len();
        head.extend(u64::try_from(*node).ok()?.to_le_bytes());
        head.extend(u16::try_from(offset).ok()?.to_le_bytes());
        head.extend([*kind, 0]);
        names.extend(name.as_bytes());
    }
    head.extend(names);
    (head.len() <= BLOCK).then_some(head)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(image: &[u8], at: usize) -> usize {
        let bytes = image[at..at + 4].try_into().unwrap();
        u32::from_le_bytes(bytes) as usize
    }

    /// The data of an inode, as a reader finds them.
    fn data(image: &[u8], node: usize) -> &[u8] {
        let inode = u32_at(image, SUPERBLOCK + 40) * BLOCK + node * INODE;
        let (size, block) = (u32_at(image, inode + 8), u32_at(image, inode + 16));
        &image[block * BLOCK..block * BLOCK + size]
    }

    fn names(directory: &[u8]) -> Vec<(String, usize)> {
        let offset =
            |at: usize| usize::from(u16::from_le_bytes([directory[at + 8], directory[at + 9]]));
        let count = offset(0) / DIRENT;
        let entry = |n: usize| {
            let end = if n + 1 == count {
                directory.len()
            } else {
                offset((n + 1) * DIRENT)
            };
            let name = &directory[offset(n * DIRENT)..end];
            (
                String::from_utf8(name.to_vec()).unwrap(),
                u32_at(directory, n * DIRENT),
            )
        };
        (0..count).map(entry).collect()
    }

    #[test]
    fn a_reader_finds_the_program_and_the_directories() {
        let program: Vec<u8> = (0..10_000u32).map(|n| n.to_le_bytes()[0]).collect();
        let image = image(&["proc", "dev"], "pause", &program).unwrap();
        assert_eq!(u32_at(&image, SUPERBLOCK), 0xE0F5_E1E2);
        assert_eq!(u32_at(&image, SUPERBLOCK + 36) * BLOCK, image.len());
        let root = names(data(&image, 0));
        let expected = [(".", 0), ("..", 0), ("dev", 2), ("pause", 3), ("proc", 1)];
        assert_eq!(root, expected.map(|(name, node)| (name.to_owned(), node)));
        assert_eq!(data(&image, 3), program);
        let empty = names(data(&image, 1));
        assert_eq!(empty, [(".".to_owned(), 1), ("..".to_owned(), 0)]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let many: Vec<String> = (0..200).map(|n| n.to_string()).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert!(image(&many, "pause", b"").is_err());
    }
}
