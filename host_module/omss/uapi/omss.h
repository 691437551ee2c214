/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/*
 * omss: one source socket, any number of sink sockets; the kernel forwards what
 * the source receives to every sink. This header is the manual of the contract.
 *
 * The door is socket options at level SOL_IP, on TCP and UDP sockets over IPv4
 * and IPv6 alike:
 *
 *	getsockopt	OMSS_HELLO		first: versions, sizes, limits
 *	setsockopt	OMSS_SET_SOURCE		this socket becomes the source of a session
 *	setsockopt	OMSS_ADD_SINK		a socket receives the stream from now on
 *	setsockopt	OMSS_REMOVE_SINK	... and no longer; its owner has it back
 *	getsockopt	OMSS_GET_STATUS		counters and lists
 *	setsockopt	OMSS_END		end a session
 *	getsockopt	OMSS_ADOPT		descriptors of a detached session's sockets
 *
 * All but OMSS_SET_SOURCE may be called on any TCP or UDP socket: `session` says
 * which session is meant, 0 the one that the socket itself belongs to. All calls
 * need CAP_NET_ADMIN in the network namespaces of the sockets that take part.
 *
 * The stream is cut into entries: a datagram is one, of a TCP source whatever was
 * there, at most `entry` bytes. Entries have numbers and live in a ring:
 *
 *	          tail                    cursor of a sink           head
 *	  gone ... | n | n+1 |     ...      | i |        ...          | (to come)
 *	           |<--------------------- ring --------------------->|
 *	                                    |<--------- lag --------->|
 *
 * The source is never held up by a sink. A sink whose cursor falls behind the
 * tail has lost whole entries, which are counted; an entry that a TCP sink has
 * begun is always finished. So a sink gets the source's bytes with nothing but
 * whole entries missing; UDP sinks get one datagram an entry.
 *
 * A session ends when its source is closed, or by OMSS_END; its sinks are usable
 * by their owners then. A DETACHED session keeps its sockets open by itself and
 * lives on without any process. A sink that is closed leaves its session.
 *
 * While a socket is in a session, its owner must not read from a source or write
 * to a sink: the bytes would be lost to, or mixed into, the stream. Sinks may be
 * read from. kTLS and sockmap are refused on them meanwhile.
 *
 * Numbers are in the byte order of the machine. Structures grow at their end: the
 * length given to the call says how much the caller knows. What a caller leaves
 * out is 0; what this module does not know must be 0.
 *
 * Errors of all calls:
 *	ENOPROTOOPT	the module is not loaded
 *	EPERM		no CAP_NET_ADMIN in a socket's network namespace
 *	EINVAL		a size, number or flag is out of its range
 *	E2BIG		something is set that this module does not know
 *	EFAULT		a pointer is wrong
 *	ENOENT		no such session, or sink
 */
#ifndef _UAPI_OMSS_H
#define _UAPI_OMSS_H

#include <linux/types.h>

#define OMSS_VERSION		1

/* Option numbers: far from those of iptables, arptables, ebtables, IPVS. */
#define OMSS_BASE		0x6f00
#define OMSS_SET_SOURCE		(OMSS_BASE + 0)		/* set */
#define OMSS_ADD_SINK		(OMSS_BASE + 1)		/* set */
#define OMSS_REMOVE_SINK	(OMSS_BASE + 2)		/* set */
#define OMSS_END		(OMSS_BASE + 3)		/* set */
#define OMSS_HELLO		(OMSS_BASE + 0)		/* get */
#define OMSS_GET_STATUS		(OMSS_BASE + 1)		/* get */
#define OMSS_ADOPT		(OMSS_BASE + 2)		/* get */
#define OMSS_OPTIONS		4

#define OMSS_CLASSES		8
#define OMSS_MAX_RING		65536			/* entries */
#define OMSS_MAX_ENTRY		65536			/* bytes */
#define OMSS_MAX_LATENCY	1000			/* milliseconds */

/* What this kernel can do: omss_hello.features. */
#define OMSS_SHARED_DATAGRAMS	(1 << 0)	/* UDP payload goes by reference too */

/* OMSS_HELLO. EPROTO: another version than the caller's; the answer is there all the same. */
struct omss_hello {
	__u32 version;			/* in, out: OMSS_VERSION */
	__u32 hello_size;		/* out: sizeof(struct omss_hello), and so on */
	__u32 source_size;
	__u32 add_size;
	__u32 remove_size;
	__u32 end_size;
	__u32 adopt_size;
	__u32 request_size;
	__u32 session_size;
	__u32 sink_size;
	__u32 features;			/* OMSS_SHARED_DATAGRAMS */
	__u32 kernel;			/* LINUX_VERSION_CODE */
	__u32 classes;
	__u32 max_ring;			/* entries */
	__u32 max_entry;		/* bytes */
	__u32 max_latency;		/* milliseconds */
	__u32 max_sinks;		/* of all sessions; 0: no limit */
	__u32 workers;			/* threads that do the work */
};

/* omss_source.flags */
#define OMSS_DETACHED		(1 << 0)	/* lives on without its process */
#define OMSS_COPY		(1 << 1)	/* copy the payload for every sink (OMSS-M) */

/* omss_source.framing: where entries begin and sinks may join */
#define OMSS_RAW		0	/* anywhere: each entry is a sync point */
/*
 * MPEG-TS (ISO/IEC 13818-1): entries of a TCP source are whole packets of 188
 * bytes, and a PAT always begins one; bytes that belong to no packet are entries
 * of their own: nothing is left out. The entry that holds a PAT is a sync point as soon as a PMT and then a packet with
 * random_access_indicator have followed it before the next PAT; a packet of video,
 * where there is any (sound could begin at every packet). Datagrams are
 * left as they are (188-byte packets, with or without an RTP header of 12 bytes).
 */
#define OMSS_MPEGTS		1

/*
 * OMSS_SET_SOURCE, on a connected TCP socket or a bound UDP socket.
 * ENOTCONN: it is not; EBUSY: it, or its sk_user_data, is in use already;
 * EOPNOTSUPP: other protocols, kTLS or another ULP, MPTCP, UDP_GRO, encapsulation;
 * ENOMEM.
 */
struct omss_source {
	__u32 flags;			/* OMSS_DETACHED, OMSS_COPY */
	__u32 framing;			/* OMSS_RAW, OMSS_MPEGTS */
	__u32 ring;			/* entries, 2 to OMSS_MAX_RING; 0: 256 */
	__u32 entry;			/* bytes, 188 to OMSS_MAX_ENTRY; 0: 4096, UDP the most.
					 * Longer datagrams are dropped.
					 */
	__u32 latency;			/* ms that an entry may wait for more; 0: none.
					 * It does not wait once half a ring has come.
					 */
	__u32 service_class;		/* of the source: 0 to 7, higher goes first */
	__u32 copy_below;		/* sends of fewer bytes are copied; 0: as the module has it */
	__u32 max_sinks;		/* of this session; 0: no limit but the module's */
};

/* omss_add_sink.join: with which entry a sink begins */
#define OMSS_LATEST		0	/* the next to come */
#define OMSS_OLDEST		1	/* the oldest in the ring */
#define OMSS_NEXT_SYNC		2	/* the first sync point that arrives from now on */
#define OMSS_FROM		3	/* the one that `from` says; what is gone of that is lost */

/* omss_add_sink.on_lag: what happens to a sink more than `lag_soft` entries behind */
#define OMSS_HEAD_DROP		0	/* it loses the oldest, and stays `lag_soft` behind */
#define OMSS_DROP_TO_SYNC	1	/* it goes on at the newest sync point. If that is not ahead
					 * of it, it loses nothing as long as the ring has what
					 * it needs; if there is none, it waits for the next
					 */
#define OMSS_DISCONNECT		2	/* its connection is shut down both ways */

/*
 * OMSS_ADD_SINK: a connected TCP or UDP socket. It sends from now on what the
 * session's source receives. ENOTCONN: not connected, listening, or shut down;
 * EBUSY: in a session already (the source itself among others), or sk_user_data
 * in use; EOPNOTSUPP: as with OMSS_SET_SOURCE; EBADF, ENOTSOCK; ENOSPC: the
 * session's or the module's limit of sinks is reached; ENOMEM.
 */
struct omss_add_sink {
	__aligned_u64 session;
	__s32 fd;
	__u32 service_class;		/* 0 to 7, higher goes first */
	__u32 join;
	__u32 on_lag;
	__u32 lag_soft;			/* entries; 0, or more than the ring: the ring */
	__u32 lag_hard;			/* ms: a sink that is behind and has taken no byte for
					 * so long is disconnected; 0: never
					 */
	__aligned_u64 from;		/* entry, with OMSS_FROM */
};

/*
 * OMSS_REMOVE_SINK: the sink leaves between two entries: what is left of one that
 * it has begun goes into its send queue, whatever that holds already. EAGAIN: not
 * even so; the sink takes no new entry (OMSS_SINK_LEAVING), its status tells how
 * many bytes are left: call again. With OMSS_HALT it stays in the session, as
 * OMSS_SINK_LEAVING and with nothing begun, so that its last status can be read.
 */
#define OMSS_HALT		(1 << 0)

struct omss_remove_sink {
	__aligned_u64 session;			/* with `sink` */
	__aligned_u64 sink;			/* its number; 0: the one behind `fd` */
	__s32 fd;			/* -1: the socket on which the call is made */
	__u32 flags;			/* OMSS_HALT */
};

/* OMSS_END: sinks leave as with OMSS_REMOVE_SINK, but at once. */
struct omss_end {
	__aligned_u64 session;
};

/*
 * OMSS_ADOPT: a descriptor of the source (`sink` 0) or a sink of a detached
 * session, close-on-exec. With OMSS_ATTACH the session is detached no longer: it
 * ends when the last descriptor of its source is closed; its sinks stay open till
 * then. EINVAL: not a detached session; EMFILE ...
 */
#define OMSS_ATTACH		(1 << 0)

struct omss_adopt {
	__aligned_u64 session;
	__aligned_u64 sink;
	__u32 flags;			/* OMSS_ATTACH, with the source */
	__s32 fd;			/* out */
};

/* omss_session_status.state */
#define OMSS_RUNNING		1
#define OMSS_DRAINING		2	/* the source is at its end, some sinks are not */
#define OMSS_ENDED		3	/* each sink has all that it will get */

/* omss_sink_status.state */
#define OMSS_SINK_STREAMING	1
#define OMSS_SINK_WAITING	2	/* for a sync point */
#define OMSS_SINK_LEAVING	3	/* see OMSS_REMOVE_SINK */
#define OMSS_SINK_FAILED	4	/* `error` says why; gets nothing more */
#define OMSS_SINK_DISCONNECTED	5	/* by `on_lag` or `lag_hard` */

/* Why entries were dropped: index of `drops`. */
#define OMSS_DROP_OVERRUN	0	/* sinks: the ring had them no more */
#define OMSS_DROP_LAG		1	/* sinks: by `lag_soft` and `on_lag` */
#define OMSS_DROP_ERROR		2	/* UDP sinks: the kernel could not send it */
#define OMSS_DROP_MEMORY	3	/* source: no memory, or max_memory reached */
#define OMSS_DROP_FRAMING	4	/* source: the rest of a packet that OMSS_DROP_MEMORY tore */
#define OMSS_DROP_SIZE		5	/* source: datagrams of more than `entry` bytes */
#define OMSS_DROP_REFUSED	6	/* UDP sinks: was sent, and refused over there (ICMP) */
#define OMSS_DROPS		8

/* What was sent, to one sink or to all of a session. */
struct omss_counters {
	__aligned_u64 bytes;		/* payload taken by the send queue */
	__aligned_u64 entries;		/* finished */
	__aligned_u64 sends;		/* calls into the socket layer that took something */
	__aligned_u64 pages;		/* handed over by reference */
	__aligned_u64 shared;		/* bytes of `bytes` in those pages */
	__aligned_u64 copied;		/* bytes of `bytes` that were copied */
	__aligned_u64 drops[OMSS_DROPS];	/* entries */
};

struct omss_session_status {
	__aligned_u64 id;		/* unique as long as the session lives */
	__u32 state;
	__u32 error;			/* errno with which the source ended, or 0 */
	struct omss_source source;	/* as it is in effect */
	__aligned_u64 head;		/* entries received so far */
	__aligned_u64 tail;		/* the oldest that is still there */
	__aligned_u64 received;		/* bytes in those entries */
	__aligned_u64 memory;		/* payload bytes in the ring */
	__aligned_u64 syncs;		/* sync points seen, MPEG-TS only */
	__u32 sinks;			/* now */
	__u32 namespace;		/* inode of the source's network namespace */
	struct omss_counters sent;	/* by all sinks, those that have left too */
	__aligned_u64 dropped[OMSS_DROPS];	/* by the source */
};

struct omss_sink_status {
	__aligned_u64 id;
	__aligned_u64 session;
	__u32 state;
	__u32 error;			/* errno with OMSS_SINK_FAILED */
	__u32 service_class;
	__u32 join;
	__u32 on_lag;
	__u32 lag_soft;			/* entries, as it is in effect */
	__u32 lag_hard;			/* ms */
	__u32 blocked;			/* 1: its send queue is full */
	__aligned_u64 cursor;		/* the first entry that it has not begun */
	__aligned_u64 lag;		/* entries */
	__u32 left;			/* bytes of a begun entry */
	__u32 quiet;			/* ms since it has taken something */
	struct omss_counters sent;
};

/*
 * OMSS_GET_STATUS: the buffer begins with a request, records follow it. The
 * call's length says how much room there is; the answer's is what was filled.
 * Records come in the order of their ids; ask again with `after` set to the last
 * id until a call returns none.
 */
#define OMSS_SESSION		0	/* one omss_session_status: `session` */
#define OMSS_SINK		1	/* one omss_sink_status: the socket of the call */
#define OMSS_SINKS		2	/* omss_sink_status of `session` */
#define OMSS_SESSIONS		3	/* omss_session_status of the socket's namespace */

#define OMSS_ALL_NAMESPACES	(1 << 0)	/* OMSS_SESSIONS: wherever the caller may */

struct omss_request {
	__u32 what;
	__u32 flags;			/* OMSS_ALL_NAMESPACES */
	__aligned_u64 session;
	__aligned_u64 after;
	__u32 record;			/* in: bytes of one that the caller knows; out: got */
	__u32 count;			/* out: records */
};

#endif
