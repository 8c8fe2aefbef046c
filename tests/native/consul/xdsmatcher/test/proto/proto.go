// Package proto is empty: the agent imports one of this name for nothing but its presence.
package proto
