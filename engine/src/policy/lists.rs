//! Doubly linked lists over dense node numbers, which share one set of arrays. A node is on one list or on none.
//!
//! Zeroed memory means "on no list", so the nodes' memory comes from the system untouched, and a page is taken only
//! when a node on it is first used. A link is the neighbour's number + 1; 0 is "none".

use crate::lazy::{Lazy, NoMemory};

/// A node's two links and its list. They lie together because a step along a list needs all of them.
type Node = [u32; 3];
/// The link to the next node towards the warm end.
const WARMER: usize = 0;
/// The link to the next node towards the cold end.
const COLDER: usize = 1;
/// The list that the node is on, + 1; 0 is "none".
const LIST: usize = 2;

/// `LISTS` lists over the nodes `0..nodes`. Each runs from a warm end to a cold end.
///
/// A call for a node in the wrong state is a bug in the caller: a debug build stops there, a release build ignores
/// the call, and the lists stay whole either way.
pub(super) struct Lists<const LISTS: usize> {
    nodes: Lazy<Node>,
    ends: [Ends; LISTS],
}

#[derive(Clone, Copy, Default)]
struct Ends {
    warm: u32,
    cold: u32,
    len: usize,
}

impl<const LISTS: usize> Lists<LISTS> {
    /// Takes memory for `nodes` nodes, none of which is on a list.
    pub(super) fn new(nodes: usize) -> Result<Self, NoMemory> {
        assert!(nodes < u32::MAX as usize, "nodes are numbered by 32 bits, and {nodes} were asked for");
        Ok(Self { nodes: Lazy::new(nodes)?, ends: [Ends::default(); LISTS] })
    }

    /// The list that `node` is on; `None` also for a node out of range.
    pub(super) fn list_of(&self, node: u32) -> Option<usize> {
        self.nodes.get(node as usize)?[LIST].checked_sub(1).map(|list| list as usize)
    }

    /// How many nodes are on `list`.
    pub(super) fn len(&self, list: usize) -> usize {
        self.ends[list].len
    }

    /// The node at the cold end of `list`.
    pub(super) fn coldest(&self, list: usize) -> Option<u32> {
        self.ends[list].cold.checked_sub(1)
    }

    /// Puts `node`, which is on no list, at the warm end of `list`.
    pub(super) fn push_warm(&mut self, list: usize, node: u32) {
        self.link(list, node, 0, self.ends[list].warm);
    }

    /// Puts `node`, which is on no list, at the cold end of `list`.
    pub(super) fn push_cold(&mut self, list: usize, node: u32) {
        self.link(list, node, self.ends[list].cold, 0);
    }

    /// Puts `node`, which is on no list, on the list of `front`, just behind it (one step colder).
    pub(super) fn push_behind(&mut self, front: u32, node: u32) {
        let Some(list) = self.list_of(front) else {
            debug_assert!(false, "node {front} is on no list");
            return;
        };
        self.link(list, node, front + 1, self.nodes[front as usize][COLDER]);
    }

    /// Takes `node` off its list and returns that list.
    pub(super) fn unlink(&mut self, node: u32) -> Option<usize> {
        let Some(list) = self.list_of(node) else {
            debug_assert!(false, "node {node} is on no list");
            return None;
        };
        let (warmer, colder) = (self.nodes[node as usize][WARMER], self.nodes[node as usize][COLDER]);
        *self.colder_link(list, warmer) = colder;
        *self.warmer_link(list, colder) = warmer;
        self.ends[list].len -= 1;
        self.nodes[node as usize][LIST] = 0;
        Some(list)
    }

    /// Takes `node` off its list and puts it at the warm end of `list`.
    pub(super) fn move_warm(&mut self, list: usize, node: u32) {
        if self.unlink(node).is_some() {
            self.push_warm(list, node);
        }
    }

    /// Takes `node` off its list and puts it on the list of `front`, just behind it.
    pub(super) fn move_behind(&mut self, front: u32, node: u32) {
        if front != node && self.unlink(node).is_some() {
            self.push_behind(front, node);
        }
    }

    /// Links `node` in between two neighbours on `list`, which are given as links.
    fn link(&mut self, list: usize, node: u32, warmer: u32, colder: u32) {
        if self.nodes.get(node as usize).is_none_or(|node| node[LIST] != 0) {
            debug_assert!(false, "node {node} is on a list already, or not below {}", self.nodes.len());
            return;
        }
        self.nodes[node as usize] = [warmer, colder, list as u32 + 1];
        *self.colder_link(list, warmer) = node + 1;
        *self.warmer_link(list, colder) = node + 1;
        self.ends[list].len += 1;
    }

    /// The link towards the cold end of the node that `link` names; if it names none, the list's warm end.
    fn colder_link(&mut self, list: usize, link: u32) -> &mut u32 {
        match link.checked_sub(1) {
            Some(node) => &mut self.nodes[node as usize][COLDER],
            None => &mut self.ends[list].warm,
        }
    }

    /// The link towards the warm end of the node that `link` names; if it names none, the list's cold end.
    fn warmer_link(&mut self, list: usize, link: u32) -> &mut u32 {
        match link.checked_sub(1) {
            Some(node) => &mut self.nodes[node as usize][WARMER],
            None => &mut self.ends[list].cold,
        }
    }

    /// The nodes of `list`, coldest first. Asserts that links, ends, length and membership agree.
    pub(super) fn dump(&self, list: usize) -> Vec<u32> {
        let ends = self.ends[list];
        let mut nodes = Vec::with_capacity(ends.len);
        let (mut link, mut colder) = (ends.cold, 0);
        while let Some(node) = link.checked_sub(1) {
            assert_eq!(self.list_of(node), Some(list), "node {node} is linked into list {list}");
            assert_eq!(
                self.nodes[node as usize][COLDER], colder,
                "node {node}: the link back towards the cold end"
            );
            nodes.push(node);
            assert!(nodes.len() <= ends.len, "list {list} has {} nodes, and more are linked", ends.len);
            (link, colder) = (self.nodes[node as usize][WARMER], link);
        }
        assert_eq!(ends.warm, colder, "list {list}: its warm end");
        assert_eq!(ends.len, nodes.len(), "list {list}: its length");
        nodes
    }
}
