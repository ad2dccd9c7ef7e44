//! The tiles of a CPU with Intel AMX.
//!
//! Rust has no stable intrinsics for them, but inline assembly. What `objdump -d -M intel` (binutils 2.40) reads back of each
//! instruction stands beside it (opcodes as in the Intel SDM, volume 2). Nobody else in a process uses tiles: no
//! compiler makes such instructions by itself, and calls don't keep them (System V ABI, x86-64 supplement), so what
//! a tile holds stays there from one block of assembly to the next. The system saves them with a thread's other
//! registers, also around signals; that takes room on a signal's stack, for which Linux asks before it
//! permits them (Documentation/arch/x86/xstate.rst).

use std::{
    arch::{
        asm,
        x86_64::{__cpuid, __cpuid_count},
    },
    io,
    sync::OnceLock,
};

use super::{Shape, Tiles, check};

/// Proof that this process may use the tiles of its CPU, and that they compute what they should.
#[derive(Clone, Copy)]
pub(super) struct Unit(());

/// Why a CPU's tiles aren't used; `None` if it has none.
type State = Option<Result<(), String>>;

impl Unit {
    pub(super) fn get() -> Option<Self> {
        matches!(state(), Some(Ok(()))).then_some(Self(()))
    }
}

/// Asked once a process.
pub(super) fn state() -> Option<Result<(), &'static str>> {
    static STATE: OnceLock<State> = OnceLock::new();
    let state = STATE.get_or_init(|| {
        let state = find();
        match &state {
            Some(Ok(())) => tracing::debug!("AMX: tiles compute what their emulation does"),
            Some(Err(reason)) => tracing::debug!("AMX is not used: {reason}"),
            None => {}
        }
        state
    });
    state.as_ref().map(|state| state.as_ref().copied().map_err(String::as_str))
}

fn find() -> State {
    has_tiles().then(|| {
        if !system_saves_tiles() {
            return Err("the system has not enabled it".into());
        }
        if !has_full_size() {
            return Err("its tiles have another size than 16 rows of 64 bytes".into());
        }
        request_permission().map_err(|error| format!("the system does not permit it: {error}"))?;
        check::agrees(&mut Unit(()))
            .map_err(|difference| format!("it computes other bits than Intel's manual says ({difference})"))
    })
}

/// CPUID (Intel SDM, volume 2, "CPUID"): AMX-TILE and AMX-BF16.
fn has_tiles() -> bool {
    let (tile, bf16) = (1 << 24, 1 << 22);
    __cpuid(0).eax >= 0x1e && __cpuid_count(7, 0).edx & (tile | bf16) == tile | bf16
}

/// XCR0: whether the system saves a thread's tiles (18) and their shapes (17).
fn system_saves_tiles() -> bool {
    let has_xgetbv = __cpuid(1).ecx & 1 << 27 != 0;
    let states = 1 << 17 | 1 << 18;
    has_xgetbv && {
        let enabled: u32;
        // SAFETY: CPUID says that the instruction exists and may be used; it writes EAX and EDX.
        unsafe {
            asm!("xgetbv", in("ecx") 0, out("eax") enabled, out("edx") _,
                options(nomem, nostack, preserves_flags));
        }
        enabled & states == states
    }
}

/// Palette 1 has eight tiles of 16 rows of 64 bytes (leaf 1DH), and products take 16 pairs (leaf 1EH).
fn has_full_size() -> bool {
    let (palette, product) = (__cpuid_count(0x1d, 1), __cpuid_count(0x1e, 0));
    palette.ebx == 8 << 16 | 64 && palette.ecx & 0xffff == 16 && product.ebx & 0xff_ffff == 64 << 8 | 16
}

/// Asks Linux for the process's permission, which its threads share. It may refuse for a signal stack that is too small.
fn request_permission() -> io::Result<()> {
    /// `asm/prctl.h`
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    /// Of XCR0.
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: both arguments are numbers; it touches no memory of ours.
    match unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What `LDTILECFG` reads (Intel SDM, volume 1, "Intel AMX instructions": palette 1).
#[repr(C, align(64))]
pub(super) struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    /// Bytes of a row; the second half belongs to tiles that do not exist.
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Config {
    pub(super) fn of(shape: &Shape) -> Self {
        let mut config =
            Self { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for tile in 0..8 {
            let (rows, columns) = shape.of(tile);
            (config.rows[tile], config.row_bytes[tile]) = (rows as u8, 4 * columns as u16);
        }
        config
    }
}

// SAFETY of every block below: a value of this type exists, so CPU and system have the instructions. They touch
// tiles, which are nobody else's, and the memory that the caller promised.
impl Tiles for Unit {
    #[inline(always)]
    fn configure(&mut self, shape: &Shape) {
        let config = Config::of(shape);
        // c4 e2 78 49 00       ldtilecfg [rax]
        unsafe {
            asm!("ldtilecfg [{config}]", config = in(reg) &config, options(readonly, nostack, preserves_flags));
        }
    }

    #[inline(always)]
    fn zero<const T: u8>(&mut self) {
        // c4 e2 7b 49 d0       tilezero tmm2
        unsafe { asm!("tilezero tmm{tile}", tile = const T, options(nomem, nostack, preserves_flags)) }
    }

    #[inline(always)]
    unsafe fn load<const T: u8>(&mut self, from: *const u32, step: usize) {
        // c4 e2 7b 4b 2c 08    tileloadd tmm5,[rax+rcx*1]
        unsafe {
            asm!("tileloadd tmm{tile}, [{from} + {step}*1]", tile = const T, from = in(reg) from,
                step = in(reg) step, options(readonly, nostack, preserves_flags));
        }
    }

    #[inline(always)]
    unsafe fn store<const T: u8>(&mut self, to: *mut u32, step: usize) {
        // c4 e2 7a 4b 1c 08    tilestored [rax+rcx*1],tmm3
        unsafe {
            asm!("tilestored [{to} + {step}*1], tmm{tile}", tile = const T, to = in(reg) to,
                step = in(reg) step, options(nostack, preserves_flags));
        }
    }

    #[inline(always)]
    fn dot<const C: u8, const A: u8, const B: u8>(&mut self) {
        // c4 e2 42 5c dd       tdpbf16ps tmm3,tmm5,tmm7
        unsafe {
            asm!("tdpbf16ps tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B,
                options(nomem, nostack, preserves_flags));
        }
    }

    #[inline(always)]
    fn release(&mut self) {
        // c4 e2 78 49 c0       tilerelease
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) }
    }
}
