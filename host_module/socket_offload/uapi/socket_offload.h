/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/*
 * socket_offload: one call takes a TCP connection out of a socket, one call
 * puts it into another. This header is the manual of the contract.
 *
 * The way of a connection:
 *
 *	SKOFF_HANDSHAKE		once per open(), before anything else
 *	SKOFF_FREEZE_EXPORT	giver: the socket falls silent; its state is a blob
 *	SKOFF_IMPORT		taker: a new socket, or a frozen one, becomes what
 *				the blob says, still frozen
 *	SKOFF_THAW			taker: the connection lives on here
 *	SKOFF_ABORT		giver: nothing happened, the connection lives on here
 *	close(2)		giver: the frozen copy goes silently, no FIN, no RST
 *
 * Frozen means: the socket sends nothing of its own, neither data nor ACK, no
 * retransmission, no keepalive, no window probe; send(2) and recv(2) on it
 * fail with EINVAL or EPERM. It takes in nothing as long as the filter given as
 * `filter` is attached. Its clocks stand still: TSval, what its timers count, its
 * congestion control's. ICMP is heard: a smaller path MTU is noted, and what was
 * too large is sent again after the thaw. What the kernel does not refuse in repair
 * mode is its holder's own doing: shutdown(2), TCP_NODELAY and TCP_CORK push what
 * is queued. A frozen socket belongs to whoever
 * holds its descriptor, not to the process that froze it: if that dies, the
 * socket stays frozen (two copies may exist, two live owners never), and any
 * other process with a descriptor may thaw, abort, import or close it. Nothing
 * in it refers to this module, which may be unloaded at any time.
 *
 * All calls need CAP_NET_ADMIN in the network namespace of the socket. Numbers
 * are in the byte order of the machine. Structures grow at their end: `size`
 * says how much the caller knows, and what it does not know is left out. A size
 * below that of version 1 is refused, and so is one that tells what this kernel does
 * not know (E2BIG). SKOFF_VERSION changes with the meaning of what is there.
 *
 * Errors of all calls:
 *	EBADF		`fd` is no open descriptor
 *	EPERM		no CAP_NET_ADMIN in the socket's network namespace, or no
 *			handshake before
 *	EINVAL		a size, a flag or a reserved field is wrong
 *	EFAULT		a pointer is
 *	EOPNOTSUPP	the socket, or the blob, cannot be moved: see `reason`
 */
#ifndef _UAPI_SOCKET_OFFLOAD_H
#define _UAPI_SOCKET_OFFLOAD_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define SKOFF_DEVICE		"socket_offload"	/* /dev/socket_offload */
#define SKOFF_VERSION		1

/* Why a connection cannot be moved. */
#define SKOFF_REASON_NONE		0
#define SKOFF_REASON_NOT_TCP	1	/* not a TCP socket over IPv4 or IPv6 */
#define SKOFF_REASON_STATE		2	/* listening, connecting or closed */
#define SKOFF_REASON_MPTCP		3
#define SKOFF_REASON_ULP		4	/* kTLS or another upper layer protocol */
#define SKOFF_REASON_SIGNED	5	/* TCP MD5 (RFC 2385) or TCP-AO (RFC 5925) */
#define SKOFF_REASON_URGENT	6	/* urgent data pending (RFC 6093) */
#define SKOFF_REASON_FILTER	7	/* the application attached a filter */
#define SKOFF_REASON_FROZEN	8	/* frozen already; or not frozen, where it must be */
#define SKOFF_REASON_BLOB		9	/* the blob contradicts itself */
#define SKOFF_REASON_CLOCK		10	/* microsecond timestamps, unknown to this kernel */

/* What a snapshot says about its connection: skoff_snapshot.flags. */
#define SKOFF_WSCALE		(1 << 0)	/* window scaling, RFC 7323 */
#define SKOFF_SACK			(1 << 1)	/* RFC 2018 */
#define SKOFF_TIMESTAMPS		(1 << 2)	/* RFC 7323 */
#define SKOFF_USEC_TS		(1 << 3)	/* TSval counts microseconds (6.7 and later) */
#define SKOFF_MAPPED		(1 << 4)	/* an IPv6 socket that carries IPv4 */
#define SKOFF_FIN_UNSENT		(1 << 5)	/* our FIN waits behind the unsent data */
#define SKOFF_FIN_READ		(1 << 6)	/* the application has seen the peer's FIN */
#define SKOFF_WARM			(1 << 7)	/* skoff_snapshot.warm means something */
#define SKOFF_NODELAY		(1 << 8)
#define SKOFF_CORK			(1 << 9)
#define SKOFF_KEEPALIVE		(1 << 10)
#define SKOFF_ECN			(1 << 11)	/* RFC 3168 was negotiated */
#define SKOFF_KNOWN_FLAGS		((1 << 12) - 1)

/*
 * What sits on the connection (TCP_ULP): skoff_snapshot.upper_layer. The place is kept
 * for kTLS; today only SKOFF_UPPER_NONE is taken, with no bytes. Anything else is
 * refused with SKOFF_REASON_ULP, by FREEZE_EXPORT as by IMPORT. A module that can move
 * a kind says so in skoff_handshake.features, without a new SKOFF_VERSION: who
 * does not know the kind refuses the blob, and all else in it stays where it is.
 */
#define SKOFF_UPPER_NONE		0
#define SKOFF_UPPER_TLS		1	/* keys, record numbers, records under way */

#define SKOFF_CA_NAME		16
#define SKOFF_CA_PRIVATE		104

/*
 * What TCP_REPAIR cannot carry: how fast this connection may go. Times in
 * microseconds where the name says so, else as struct tcp_sock has them.
 */
struct skoff_warm {
	__u32 snd_cwnd;			/* segments */
	__u32 snd_ssthresh;		/* segments */
	__u32 snd_cwnd_cnt;
	__u32 srtt_us;			/* times 8 */
	__u32 mdev_us;			/* times 4 */
	__u32 mdev_max_us;
	__u32 rttvar_us;
	__u32 rto_us;
	__u32 min_rtt_us;
	__u32 reordering;		/* segments */
	__u32 rate_delivered;		/* delivery rate: segments ... */
	__u32 rate_interval_us;		/* ... in this time */
	__u32 delivered;		/* segments since the beginning */
	__u32 lost;
	__u32 rcv_ssthresh;		/* bytes */
	__u32 window_clamp;		/* bytes */
	__u32 rcvq_space;		/* bytes */
	__u32 rcv_rtt_us;		/* times 8 */
	__u32 ca_state;			/* enum tcp_ca_state when it was frozen */
	__u32 ca_hz;			/* ticks a second of ca_jiffies */
	__u32 ca_jiffies;		/* tcp_jiffies32 when it was frozen */
	__u32 rate_app_limited;
	__u64 ca_clock_us;		/* tcp_clock_us() when it was frozen */
	__u64 pacing_rate;		/* bytes a second */
	__u64 bytes_acked;
	__u8 ca_private[SKOFF_CA_PRIVATE];	/* icsk_ca_priv of skoff_snapshot.congestion */
};

/*
 * The fixed part of a blob. What follows it:
 *
 *	struct skoff_segment[segments]	the out-of-order queue, ascending
 *	receive_length bytes		received in order, not read yet
 *	unacked_length bytes		sent, not acknowledged
 *	unsent_length bytes		queued, never sent
 *	the segments' bytes		in their order
 *	upper_length bytes		of the upper layer
 *
 *	send	snd_una                                               receive  copied_seq
 *		|<-- unacked -->|<-- unsent -->|                               |<-- receive -->|
 *		SND.UNA         SND.NXT        write_seq                       copied_seq      RCV.NXT
 *
 * A FIN counts as one in the sequence spaces (RFC 9293 section 3.4) and is in
 * none of the lengths.
 */
struct skoff_snapshot {
	__u32 size;			/* of this structure */
	__u32 flags;
	__u8 state;			/* TCP_ESTABLISHED ... TCP_CLOSING */
	__u8 family;			/* AF_INET or AF_INET6: on the wire */
	__u8 snd_wscale;
	__u8 rcv_wscale;
	__u16 local_port;
	__u16 peer_port;
	__u8 local[16];
	__u8 peer[16];
	__u32 snd_una;
	__u32 copied_seq;
	__u32 segments;
	__u32 receive_length;
	__u32 unacked_length;
	__u32 unsent_length;
	__u32 mss_clamp;		/* the peer's MSS option */
	__u32 mss_cache;		/* of the path, as far as it is known */
	__u32 snd_wl1;
	__u32 snd_wnd;			/* bytes */
	__u32 max_window;		/* bytes */
	__u32 rcv_wnd;			/* bytes */
	__u32 rcv_wup;
	__u32 timestamp;		/* the next TSval */
	__u32 ts_recent;
	__u32 ts_recent_age;		/* seconds; 0xffffffff: never set */
	/* Socket options, as setsockopt(2) takes them. */
	__u32 keepalive_idle;		/* seconds */
	__u32 keepalive_interval;	/* seconds */
	__u32 keepalive_count;
	__u32 send_buffer;		/* bytes, as getsockopt(2) reports it */
	__u32 receive_buffer;
	__u32 buffer_lock;		/* SO_BUF_LOCK */
	__u32 traffic_class;
	__u32 mark;
	__u32 priority;
	__u32 user_timeout;		/* milliseconds */
	char congestion[SKOFF_CA_NAME];
	__u32 upper_layer;		/* SKOFF_UPPER_* */
	__u32 upper_length;		/* bytes */
	struct skoff_warm warm;
};

struct skoff_segment {
	__u32 sequence;
	__u32 length;
};

#define SKOFF_MAX_QUEUE		(16u << 20)	/* bytes, all queues together */
#define SKOFF_MAX_SEGMENTS		4096

struct skoff_handshake {
	__u32 size;			/* in: of this structure */
	__u32 version;			/* in, out: SKOFF_VERSION; EPROTO if they differ */
	__u32 snapshot_size;		/* out: sizeof(struct skoff_snapshot) */
	__u32 segment_size;		/* out: sizeof(struct skoff_segment) */
	__u32 kernel;			/* out: LINUX_VERSION_CODE */
	__u32 features;			/* out: bit SKOFF_UPPER_*: this kind can be moved; none yet */
};

/* Of version 1; the numbers of the calls keep them. */
#define SKOFF_HANDSHAKE_SIZE	24
#define SKOFF_EXPORT_SIZE		32
#define SKOFF_IMPORT_SIZE		56
#define SKOFF_THAW_SIZE		16

/*
 * SKOFF_FREEZE_EXPORT: under one lock, the socket is frozen and described. On any
 * error it is as it was. `filter` is a descriptor of an eBPF socket filter that
 * is attached first, or -1: the caller has seen to it that no packet comes.
 * ENOSPC: `length` says how much room the blob needs. EBUSY: packets kept coming past
 * the filter. SKOFF_OWN: a filter that is attached already is the caller's own, and replaced.
 */
#define SKOFF_OWN			(1 << 0)

struct skoff_export {
	__u32 size;			/* in: of this structure */
	__s32 fd;
	__s32 filter;
	__u32 flags;			/* SKOFF_OWN */
	__aligned_u64 buffer;
	__u32 length;			/* in: of the buffer; out: of the blob */
	__u32 reason;			/* out: SKOFF_REASON_* with EOPNOTSUPP */
};

/*
 * SKOFF_IMPORT: into a closed socket of the right family, or a frozen one. A
 * frozen one that stands at the same ends with empty queues is completed in
 * place: the kernel knows the connection at every moment. Any other is rebuilt,
 * and unknown to the kernel meanwhile. On an error a frozen socket may be left
 * closed, and is not frozen then; its descriptor stays valid. Buffers get what the
 * blob says, but no more than anybody could have here (tcp_wmem, wmem_max; tcp_rmem,
 * rmem_max). With SKOFF_BIND the local end is `local` and
 * `local_port` and not the snapshot's. SKOFF_OPTIONS: set its socket options too.
 * EBUSY: somebody else had the socket in hand meanwhile.
 * EADDRINUSE, EADDRNOTAVAIL, ENETUNREACH ... as bind(2) and connect(2).
 */
#define SKOFF_BIND			(1 << 0)
#define SKOFF_OPTIONS		(1 << 1)

struct skoff_import {
	__u32 size;			/* in: of this structure */
	__s32 fd;
	__s32 filter;			/* as in skoff_export, for the frozen socket */
	__u32 flags;			/* SKOFF_BIND, SKOFF_OPTIONS */
	__aligned_u64 buffer;
	__u32 length;
	__u32 reason;			/* out */
	__u8 local[16];
	__u16 local_port;
	__u16 reserved[3];
};

/* SKOFF_THAW, SKOFF_ABORT: EOPNOTSUPP with SKOFF_REASON_FROZEN if it is not frozen. */
struct skoff_thaw {
	__u32 size;			/* in: of this structure */
	__s32 fd;
	__u32 reason;			/* out */
	__u32 reserved;
};

#define SKOFF_CALL(number, size)	_IOC(_IOC_READ | _IOC_WRITE, 0xb5, number, size)
#define SKOFF_HANDSHAKE		SKOFF_CALL(0, SKOFF_HANDSHAKE_SIZE)
#define SKOFF_FREEZE_EXPORT	SKOFF_CALL(1, SKOFF_EXPORT_SIZE)
#define SKOFF_IMPORT		SKOFF_CALL(2, SKOFF_IMPORT_SIZE)
#define SKOFF_THAW			SKOFF_CALL(3, SKOFF_THAW_SIZE)
#define SKOFF_ABORT		SKOFF_CALL(4, SKOFF_THAW_SIZE)

#endif
